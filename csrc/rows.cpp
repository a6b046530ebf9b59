// z_n        = logit_scale * softcap * tanh(a_n / softcap)      (softcap optional)
// log_prob_n = z_n[y_n] - logsumexp(z_n)
// a_n        <- (onehot(y_n) - softmax(z_n)) * d z_n / d a_n
//
// Two passes over a row: an online max and sum, then the gradient. Exponentials are computed twice
// because a second one costs less than a third trip through the cache. The label is kept apart
// from the other columns: log_prob = -log(1 + sum of the others / exp(z_y)) does not cancel where
// the model is sure of the label, and target_logits needs no write into the chunk.
//
// kl_n = sum_v p_ref (exp(x) - 1 - x) with x = log p - log p_ref: no term is negative, and none
// cancels where the model is near its reference.
// a_n  <- (p - p_ref) * d z_n / d a_n
#include "rows.h"

#include <type_traits>

#include "lanes.h"

namespace npo_fast {
namespace {

constexpr int64_t BLOCK = 1024;  // logits whose z waits in L1 between their max and their sum
constexpr int UNROLL = 2;        // accumulators a loop: hide latency, yet fit the registers

template <class F>
struct Activated {
  Vector<F> z, slope;  // slope = d z / d a
};

// a -> z; where the slope is not read, the compiler drops it
template <class F, bool capped>
struct Activation {
  F softcap, scale;

  explicit Activation(const Logits& of) : softcap(F(of.softcap)), scale(F(of.logit_scale)) {}

  Activated<F> operator()(Vector<F> raw) const {
    if (!capped) return {raw * scale, broadcast(scale)};
    const auto t = tanh(raw / softcap);
    return {t.value * softcap * scale, t.slope * scale};
  }
};

// The logsumexp of what has been added so far is max + log(sum).
struct LogSumExp {
  double max = -INFINITY;
  double sum = 0;

  // exp(z - shift()) is 0, not NaN, while every z is -inf
  double shift() const { return max == -INFINITY ? 0 : max; }
  double value() const { return max + ::log(sum); }
};

double higher(double a, double b) { return a > b ? a : b; }
double lower(double a, double b) { return a > b ? b : a; }

template <class F>
double largest(const F* z, int64_t count) {
  Vector<F> most[UNROLL];
  for (auto& one : most) one = broadcast(F(-INFINITY));
  for (int64_t at = 0; at < count; at += UNROLL * lanes<F>) {
    for (int k = 0; k < UNROLL; ++k) {
      const Vector<F> value = load(z + at + k * lanes<F>);
      most[k] = value > most[k] ? value : most[k];
    }
  }
  F result = -INFINITY;
  for (const auto& one : most) {
    for (int lane = 0; lane < lanes<F>; ++lane) result = one[lane] > result ? one[lane] : result;
  }
  return result;
}

template <class F>
double sum_of_exp(const F* z, int64_t count, F shift) {
  Vector<F> sums[UNROLL] = {};
  for (int64_t at = 0; at < count; at += UNROLL * lanes<F>) {
    for (int k = 0; k < UNROLL; ++k) sums[k] += exp(load(z + at + k * lanes<F>) - shift);
  }
  double result = 0;
  for (const auto& one : sums) {
    for (int lane = 0; lane < lanes<F>; ++lane) result += one[lane];
  }
  return result;
}

// A NaN reaches the sum although no comparison in the max lets it through; so does +inf, as
// inf - inf. Sums beyond a block are fp64: rounding does not grow with the vocabulary.
template <class T, bool capped>
void add(LogSumExp& total, const T* logits, int64_t count, Activation<Wide<T>, capped> activation) {
  using F = Wide<T>;
  constexpr int64_t step = UNROLL * lanes<F>;
  alignas(64) F z[BLOCK];
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t n = count - first < BLOCK ? count - first : BLOCK;
    const int64_t padded = (n + step - 1) / step * step;
    int64_t at = 0;
    for (; at + lanes<F> <= n; at += lanes<F>) {
      store(z + at, activation(load(logits + first + at)).z);
    }
    if (at < n) store(z + at, activation(load_first(logits + first + at, n - at)).z);
    for (at = n; at < padded; ++at) z[at] = -INFINITY;

    const double most = largest(z, padded);
    if (most > total.max) {
      total.sum *= ::exp(total.max - most);
      total.max = most;
    }
    total.sum += sum_of_exp(z, padded, F(total.shift()));
  }
}

template <class T, bool capped>
void write_gradient(T* logits, int64_t count, Activation<Wide<T>, capped> activation,
                    Wide<T> shift, Wide<T> share) {
  using F = Wide<T>;
  const auto gradient = [&](Vector<F> raw) {
    const auto [z, slope] = activation(raw);
    return exp(z - shift) * -share * slope;
  };
  int64_t at = 0;
  for (; at + lanes<F> <= count; at += lanes<F>) store(logits + at, gradient(load(logits + at)));
  if (at < count) {
    store_first(logits + at, gradient(load_first(logits + at, count - at)), count - at);
  }
}

template <class T, bool capped>
void row_log_probs(const WholeRows& rows, int64_t row) {
  using F = Wide<T>;
  const Activation<F, capped> activation(rows.logits);
  T* logits = static_cast<T*>(rows.logits.data) + row * rows.logits.stride;
  const int64_t label = rows.labels[row];

  LogSumExp others;
  add(others, logits, label, activation);
  add(others, logits + label + 1, rows.columns - label - 1, activation);
  const Activated<F> target =
      activation(rows.target_logits ? broadcast(static_cast<const F*>(rows.target_logits)[row])
                                    : load_first(logits + label, 1));

  const double z = target.z[0];
  const double rest = others.value();
  const double above = ::log1p(::exp(lower(rest, z) - higher(rest, z)));
  const double lse = higher(rest, z) + above;
  const double log_prob = (z - higher(rest, z)) - above;  // NaN for z = +inf, as it should be
  static_cast<F*>(rows.log_probs)[row] = F(log_prob);
  static_cast<F*>(rows.lse)[row] = F(lse);

  const double shift = others.shift();
  write_gradient(logits, rows.columns, activation, F(shift), F(::exp(shift - lse)));
  store_first(logits + label, F(-::expm1(log_prob)) * target.slope, 1);
}

template <class T, bool capped>
void tile_log_probs(const TileRows& rows, int64_t row) {
  using F = Wide<T>;
  const Activation<F, capped> activation(rows.logits);
  const T* logits = static_cast<const T*>(rows.logits.data) + row * rows.logits.stride;
  const int64_t label = rows.labels[row];

  LogSumExp others;
  if (label < 0 || label >= rows.columns) {
    add(others, logits, rows.columns, activation);
  } else {
    add(others, logits, label, activation);
    add(others, logits + label + 1, rows.columns - label - 1, activation);
    rows.target[row] = activation(load_first(logits + label, 1)).z[0];
  }
  const double before = rows.others[row], tile = others.value();
  const double high = higher(before, tile);
  if (high != -INFINITY) {
    rows.others[row] = high + ::log1p(::exp(lower(before, tile) - high));
  }
}

template <class F>
struct KlTerm {
  Vector<F> value, gradient;  // gradient in the raw logit
};

template <class T, bool capped, bool ref_capped>
void row_kl(const KlRows& rows, int64_t row) {
  using F = Wide<T>;
  const Activation<F, capped> activation(rows.logits);
  const Activation<F, ref_capped> ref_activation(rows.ref_logits);
  T* logits = static_cast<T*>(rows.logits.data) + row * rows.logits.stride;
  const T* ref_logits = static_cast<const T*>(rows.ref_logits.data) + row * rows.ref_logits.stride;

  LogSumExp total, ref_total;
  add(total, logits, rows.columns, activation);
  add(ref_total, ref_logits, rows.columns, ref_activation);
  const double lse = total.value(), ref_lse = ref_total.value();
  const F shift = F(total.shift()), share = F(::exp(total.shift() - lse));
  const F ref_shift = F(ref_total.shift()), ref_share = F(::exp(ref_total.shift() - ref_lse));
  const F lse_difference = F(lse - ref_lse);

  const auto term = [&](Vector<F> raw, Vector<F> ref_raw) -> KlTerm<F> {
    const auto [z, slope] = activation(raw);
    const Vector<F> ref_z = ref_activation(ref_raw).z;
    const Vector<F> p = exp(z - shift) * share;
    const Vector<F> p_ref = exp(ref_z - ref_shift) * ref_share;
    const Vector<F> x = (z - ref_z) - lse_difference;
    const auto near = absolute<F>(x) < F(0.34);
    const Vector<F> tail = p_ref * exp_tail(near ? x : Vector<F>{});
    const Vector<F> difference = near ? p_ref * x + tail : p - p_ref;
    const Vector<F> value = near ? tail : difference - p_ref * x;
    return {p_ref == 0 ? p : value, difference * slope};  // 0 * log 0 = 0
  };
  double kl = 0;
  for (int64_t first = 0; first < rows.columns; first += BLOCK) {
    const int64_t last = rows.columns - first < BLOCK ? rows.columns : first + BLOCK;
    Vector<F> sum{};
    int64_t at = first;
    for (; at + lanes<F> <= last; at += lanes<F>) {
      const KlTerm<F> one = term(load(logits + at), load(ref_logits + at));
      sum += one.value;
      store(logits + at, one.gradient);
    }
    for (int lane = 0; lane < lanes<F>; ++lane) kl += sum[lane];
    if (at == last) continue;
    const int64_t rest = last - at;
    const KlTerm<F> one = term(load_first(logits + at, rest), load_first(ref_logits + at, rest));
    for (int64_t lane = 0; lane < rest; ++lane) kl += one.value[lane];
    store_first(logits + at, one.gradient, rest);
  }
  static_cast<F*>(rows.kl)[row] = F(kl);
}

// kernel(whether there is a softcap), known to the compiler
template <class Kernel>
void by_softcap(const Logits& logits, Kernel kernel) {
  logits.softcap != 0 ? kernel(std::true_type{}) : kernel(std::false_type{});
}

// kernel(a zero of the dtype, whether there is a softcap)
template <class Kernel>
void specialised(const Rows& rows, Kernel kernel) {
  by_softcap(rows.logits, [&](auto capped) {
    switch (rows.dtype) {
      case Dtype::fp32: return kernel(float{}, capped);
      case Dtype::bf16: return kernel(BFloat16{}, capped);
      case Dtype::fp16: return kernel(Half{}, capped);
      case Dtype::fp64: return kernel(double{}, capped);
    }
  });
}

void all_row_log_probs(const WholeRows& rows, int64_t first, int64_t last) {
  specialised(rows, [&](auto zero, auto capped) {
    for (int64_t row = first; row < last; ++row) row_log_probs<decltype(zero), capped>(rows, row);
  });
}

void all_tile_log_probs(const TileRows& rows, int64_t first, int64_t last) {
  specialised(rows, [&](auto zero, auto capped) {
    for (int64_t row = first; row < last; ++row) tile_log_probs<decltype(zero), capped>(rows, row);
  });
}

void all_row_kl(const KlRows& rows, int64_t first, int64_t last) {
  specialised(rows, [&](auto zero, auto capped) {
    by_softcap(rows.ref_logits, [&](auto ref_capped) {
      for (int64_t row = first; row < last; ++row) {
        row_kl<decltype(zero), capped, ref_capped>(rows, row);
      }
    });
  });
}

}  // namespace

namespace NPO_ISA {
extern const Kernels kernels = {all_row_log_probs, all_tile_log_probs, all_row_kl};
}

}  // namespace npo_fast
