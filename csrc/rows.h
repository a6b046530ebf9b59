// The row kernels as the torch side sees them: plain pointers, one copy an instruction set.
#pragma once

#include <cstdint>

namespace npo_fast {

enum class Dtype { fp32, bf16, fp16, fp64 };

// Raw logits of one model: C contiguous elements a row.
struct Logits {
  void* data;      // (R, C)
  int64_t stride;  // elements from one row to the next
  double softcap;  // 0: none
  double logit_scale;
};

struct Rows {
  Dtype dtype;
  Logits logits;
  int64_t columns;  // C
};

// All of the vocabulary: log-probs, and logits <- d log_prob / d logits. fp32, or fp64 beside fp64.
struct WholeRows : Rows {
  const int64_t* labels;      // (R,) in [0, C)
  const void* target_logits;  // (R,) raw, replaces the logit at the label; or null
  void* log_probs;            // (R,)
  void* lse;                  // (R,)
};

// A slice of the vocabulary: labels count from its first column and may lie outside.
struct TileRows : Rows {
  const int64_t* labels;  // (R,)
  double* others;         // (R,) logsumexp of the columns so far that are not the label
  double* target;         // (R,) z at the label
};

// Two chunks of one dtype, all of the vocabulary: logits <- d kl / d logits.
struct KlRows : Rows {
  Logits ref_logits;  // left alone
  void* kl;           // (R,) fp32, or fp64 beside fp64
};

// Rows [first, last) of a chunk, as each instruction set has them.
struct Kernels {
  void (*row_log_probs)(const WholeRows&, int64_t first, int64_t last);
  void (*tile_log_probs)(const TileRows&, int64_t first, int64_t last);
  void (*row_kl)(const KlRows&, int64_t first, int64_t last);
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
