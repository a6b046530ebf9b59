// What a head does to its raw logits: z = logit_scale * softcap * tanh(a / softcap).
//
// The C++ side of npo_fast/kernels/transform.py, and the one place here that lists the settings:
// other files pass a Transform on.
#pragma once

#include <optional>

#ifdef NPO_LANE_BYTES
#include "lanes.h"
#endif

namespace npo_fast {

struct Transform {
  double softcap;  // 0: none
  double logit_scale;

  bool capped() const { return softcap != 0; }
};

// The arguments of an operator that stand for a Transform, and the Transform that they make.
#define NPO_TRANSFORM_ARGUMENTS(prefix) \
  std::optional<double> prefix##softcap, double prefix##logit_scale
#define NPO_TRANSFORM(prefix) \
  ::npo_fast::Transform { prefix##softcap.value_or(0), prefix##logit_scale }

#ifdef NPO_LANE_BYTES
namespace {

template <class F>
struct Activated {
  Vector<F> z, slope;  // slope = d z / d a
};

// a -> z; where the slope is not read, the compiler drops it
template <class F, bool capped>
struct Activation {
  F softcap, scale;

  explicit Activation(const Transform& transform)
      : softcap(F(transform.softcap)), scale(F(transform.logit_scale)) {}

  Activated<F> operator()(Vector<F> raw) const {
    if (!capped) return {raw * scale, broadcast(scale)};
    const auto t = tanh(raw / softcap);
    return {t.value * softcap * scale, t.slope * scale};
  }
};

}  // namespace
#endif

}  // namespace npo_fast
