// The row kernels as the torch side sees them: plain pointers, one copy an instruction set.
#pragma once

#include <cstdint>

#include "transform.h"

namespace npo_fast {

enum class Dtype { fp32, bf16, fp16, fp64 };

// Raw logits of one model, a column (a token of the vocabulary) after another.
struct Logits {
  void* data;      // (C, R): R contiguous elements a column
  int64_t stride;  // elements from one column to the next
  Transform transform;
};

struct Rows {
  Dtype dtype;
  int64_t rows, columns;  // R, C
  Logits logits;
};

// All of the vocabulary: log-probs, and softmax = exp(z - shift) * share. fp32, or fp64 beside fp64.
struct WholeRows : Rows {
  const int64_t* labels;      // (R,) in [0, C)
  const void* target_logits;  // (R,) raw, replaces the logit at the label; or null
  void* log_probs;            // (R,)
  void* lse;                  // (R,)
  void* shift;                // (R,)
  void* share;                // (R,)
};

// All of the vocabulary or a slice: logits <- g * d log_prob / d logits. fp32, or fp64 beside fp64.
struct GradientRows : Rows {
  const int64_t* labels;  // (R,) counted from the first column; may lie outside
  const void* log_probs;  // (R,)
  const void* shift;      // (R,)
  const void* share;      // (R,)
  const void* g;          // (R,)
};

// A slice of the vocabulary: labels count from its first column and may lie outside.
struct TileRows : Rows {
  const int64_t* labels;  // (R,)
  double* others;         // (R,) logsumexp of the columns so far that are not the label
  double* target;         // (R,) z at the label
};

// Two chunks of one dtype: logits <- d kl / d logits. Of a slice of the vocabulary, either logsumexp
// is that of all of it. fp32, or fp64 beside fp64.
struct KlRows : Rows {
  Logits ref_logits;    // left alone
  const void* lse;      // (R,) or null: the columns are all
  const void* ref_lse;  // (R,) or null
  void* kl;           // (R,) fp32, or fp64 beside fp64
};

// Calls body(context, first, last) for ranges that make up [0, count), `grain` or more at a time.
using Body = void (*)(const void* context, int64_t first, int64_t last);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, const void* context);

// As each instruction set has them.
struct Kernels {
  void (*row_log_probs)(const WholeRows&, ParallelFor);
  void (*row_gradient)(const GradientRows&, ParallelFor);
  void (*tile_log_probs)(const TileRows&, ParallelFor);
  void (*row_kl)(const KlRows&, ParallelFor);
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
