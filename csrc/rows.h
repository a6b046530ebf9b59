// The row kernels as the torch side sees them: plain pointers, one copy an instruction set.
#pragma once

#include <cstdint>

namespace npo_fast {

enum class Dtype { fp32, bf16, fp16, fp64 };

// One chunk of raw logits.
struct Rows {
  Dtype dtype;
  void* logits;           // (R, C): C contiguous elements a row
  int64_t stride;         // elements from one row to the next
  int64_t columns;        // C
  const int64_t* labels;  // (R,)
  double softcap;         // 0: none
  double logit_scale;
};

// All of the vocabulary: log-probs, and logits <- d log_prob / d logits. fp32, or fp64 beside fp64.
struct WholeRows : Rows {
  const void* target_logits;  // (R,) raw, replaces the logit at the label; or null
  void* log_probs;            // (R,)
  void* lse;                  // (R,)
};

// A slice of the vocabulary: labels count from its first column and may lie outside.
struct TileRows : Rows {
  double* others;  // (R,) logsumexp of the columns so far that are not the label
  double* target;  // (R,) z at the label
};

// Rows [first, last) of a chunk, as each instruction set has them.
struct RowKernels {
  void (*row_log_probs)(const WholeRows&, int64_t first, int64_t last);
  void (*tile_log_probs)(const TileRows&, int64_t first, int64_t last);
};

// rows.cpp is compiled once for each of these; register.cpp picks at run time.
namespace plain {
extern const RowKernels kernels;
}
namespace avx2 {
extern const RowKernels kernels;
}
namespace avx512 {
extern const RowKernels kernels;
}

}  // namespace npo_fast
