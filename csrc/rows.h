// The row kernels as the torch side sees them: plain pointers, one copy an instruction set.
#pragma once

#include <cstdint>

namespace npo_fast {

enum class Dtype { fp32, bf16, fp16, fp64 };

// One chunk of raw logits. Everything that is not the chunk itself is fp32, or fp64 beside fp64.
struct Rows {
  Dtype dtype;
  void* logits;               // (R, V): V contiguous elements a row
  int64_t stride;             // elements from one row to the next
  int64_t vocabulary;         // V
  const int64_t* labels;      // (R,) in [0, V)
  const void* target_logits;  // (R,) raw, replaces the logit at the label; or null
  double softcap;             // 0: none
  double logit_scale;
  void* log_probs;  // (R,)
  void* lse;        // (R,)
  bool gradient;    // also replace logits by d log_prob / d logits
};

// Raw logits of one model: V contiguous elements a row.
struct Logits {
  void* data;      // (R, V)
  int64_t stride;  // elements from one row to the next
  double softcap;  // 0: none
  double logit_scale;
};

// Two chunks of one dtype.
struct KlRows {
  Dtype dtype;
  Logits logits;      // replaced by d kl / d logits
  Logits ref_logits;  // left alone
  int64_t vocabulary;
  void* kl;  // (R,) fp32, or fp64 beside fp64
};

struct Kernels {
  void (*log_probs)(const Rows&, int64_t first, int64_t last);
  void (*kl)(const KlRows&, int64_t first, int64_t last);
};

// rows.cpp is compiled once for each of these; register.cpp picks at run time.
namespace plain {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace npo_fast
