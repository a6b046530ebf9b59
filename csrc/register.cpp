// The operators of npo_fast/kernels/operators.py for the CPU, through PyTorch's stable C++ ABI:
// one build serves every PyTorch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>

#include "rows.h"

namespace npo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The widest the processor has; PyTorch's own variable ATEN_CPU_CAPABILITY caps it.
const Kernels& pick_kernels() {
#ifdef NPO_X86
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = cap ? cap : "avx512";
  if (most == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::kernels;
  }
  if (most != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::kernels;
  }
#endif
  return plain::kernels;
}

const Kernels& kernels() {
  static const Kernels& picked = pick_kernels();
  return picked;
}

Dtype dtype_of(const char* op, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return Dtype::fp32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::fp16;
    case ScalarType::Double: return Dtype::fp64;
    default: STD_TORCH_CHECK(false, op, ": logits must be float32, bfloat16, float16 or float64");
  }
}

ScalarType opmath_of(Dtype dtype) {
  return dtype == Dtype::fp64 ? ScalarType::Double : ScalarType::Float;
}

void check_rows(const char* op, const Tensor& logits, const Tensor& labels) {
  STD_TORCH_CHECK(logits.dim() == 2, op, ": logits must be (R, V), got ", logits.dim(), " dims");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
                      labels.size(0) == logits.size(0),
                  op, ": labels must be (", logits.size(0), ",) int64, one a row of logits");
}

// Columns may be strided, rows may not: the copy is for layouts that no caller here makes.
Tensor dense_rows(const Tensor& logits) {
  if (logits.size(0) <= 1 || logits.stride(0) == 1) return logits;
  const Tensor columns = torch::stable::transpose(logits, 0, 1);
  return torch::stable::transpose(torch::stable::contiguous(columns), 0, 1);
}

Logits logits_of(const Tensor& logits, const Transform& transform) {
  return {logits.data_ptr(), logits.stride(1), transform};
}

template <class SomeRows>
SomeRows rows_of(const char* op, const Tensor& logits, const Transform& transform) {
  SomeRows rows{};
  rows.dtype = dtype_of(op, logits);
  rows.rows = logits.size(0);
  rows.columns = logits.size(1);
  rows.logits = logits_of(logits, transform);
  return rows;
}

void parallel_for(int64_t count, int64_t grain, Body body, const void* context) {
  torch::stable::parallel_for(
      0, count, grain, [&](int64_t first, int64_t last) { body(context, first, last); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_log_probs(Tensor logits, Tensor labels,
                                                         std::optional<Tensor> target_logits,
                                                         NPO_TRANSFORM_ARGUMENTS()) {
  const char* op = "row_log_probs";
  check_rows(op, logits, labels);
  const int64_t count = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(!target_logits || (target_logits->dim() == 1 && target_logits->size(0) == count),
                  op, ": target_logits must be (", count, ",), one a row of logits");
  const Tensor dense_labels = torch::stable::contiguous(labels);
  const Tensor chunk = dense_rows(logits);
  auto rows = rows_of<WholeRows>(op, chunk, NPO_TRANSFORM());
  rows.labels = static_cast<const int64_t*>(dense_labels.data_ptr());
  for (int64_t row = 0; row < count; ++row) {
    const int64_t label = rows.labels[row];
    STD_TORCH_CHECK(label >= 0 && label < vocabulary, op, ": labels[", row, "] = ", label,
                    " is outside the vocabulary [0, ", vocabulary, ")");
  }

  const auto opmath = opmath_of(rows.dtype);
  Tensor log_probs = torch::stable::new_empty(logits, {count}, opmath);
  Tensor lse = torch::stable::new_empty(logits, {count}, opmath);
  Tensor shift = torch::stable::new_empty(logits, {count}, opmath);
  Tensor share = torch::stable::new_empty(logits, {count}, opmath);
  std::optional<Tensor> targets;
  if (target_logits) {
    targets = torch::stable::contiguous(torch::stable::to(*target_logits, opmath));
    rows.target_logits = targets->data_ptr();
  }
  rows.log_probs = log_probs.data_ptr();
  rows.lse = lse.data_ptr();
  rows.shift = shift.data_ptr();
  rows.share = share.data_ptr();
  kernels().row_log_probs(rows, parallel_for);
  return {log_probs, lse, shift, share};
}

void row_gradient_(Tensor logits, Tensor labels, Tensor log_probs, Tensor shift, Tensor share,
                   Tensor g, NPO_TRANSFORM_ARGUMENTS()) {
  const char* op = "row_gradient_";
  check_rows(op, logits, labels);
  const Tensor dense_labels = torch::stable::contiguous(labels);
  const Tensor chunk = dense_rows(logits);
  auto rows = rows_of<GradientRows>(op, chunk, NPO_TRANSFORM());
  const auto dense = [&](const Tensor& values) {
    STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == logits.size(0), op,
                    ": log_probs, shift, share and g must be (", logits.size(0),
                    ",), one a row of logits");
    return torch::stable::contiguous(torch::stable::to(values, opmath_of(rows.dtype)));
  };
  const Tensor row_operands[] = {dense(log_probs), dense(shift), dense(share), dense(g)};
  rows.labels = static_cast<const int64_t*>(dense_labels.data_ptr());
  rows.log_probs = row_operands[0].data_ptr();
  rows.shift = row_operands[1].data_ptr();
  rows.share = row_operands[2].data_ptr();
  rows.g = row_operands[3].data_ptr();
  kernels().row_gradient(rows, parallel_for);
  if (rows.logits.data != logits.data_ptr()) torch::stable::copy_(logits, chunk);
}

void tile_log_probs_(Tensor logits, Tensor labels, NPO_TRANSFORM_ARGUMENTS(), Tensor others,
                     Tensor target) {
  const char* op = "tile_log_probs_";
  check_rows(op, logits, labels);
  const int64_t count = logits.size(0);
  for (const Tensor& sums : {others, target}) {
    STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.dim() == 1 &&
                        sums.size(0) == count && (count <= 1 || sums.stride(0) == 1),
                    op, ": others and target must be contiguous (", count, ",) float64");
  }
  const Tensor dense_labels = torch::stable::contiguous(labels);
  const Tensor tile = dense_rows(logits);
  auto rows = rows_of<TileRows>(op, tile, NPO_TRANSFORM());
  rows.labels = static_cast<const int64_t*>(dense_labels.data_ptr());
  rows.others = static_cast<double*>(others.data_ptr());
  rows.target = static_cast<double*>(target.data_ptr());
  kernels().tile_log_probs(rows, parallel_for);
}

Tensor row_kl_(Tensor logits, Tensor ref_logits, NPO_TRANSFORM_ARGUMENTS(),
               NPO_TRANSFORM_ARGUMENTS(ref_), std::optional<Tensor> lse,
               std::optional<Tensor> ref_lse) {
  const char* op = "row_kl_";
  STD_TORCH_CHECK(logits.dim() == 2 && ref_logits.dim() == 2 &&
                      logits.size(0) == ref_logits.size(0) && logits.size(1) == ref_logits.size(1),
                  op, ": logits and ref_logits must be (R, V) of one shape");
  STD_TORCH_CHECK(logits.scalar_type() == ref_logits.scalar_type(), op,
                  ": logits and ref_logits must have one dtype");
  const int64_t count = logits.size(0);
  Tensor chunk = dense_rows(logits);
  const Tensor ref_chunk = dense_rows(ref_logits);
  auto rows = rows_of<KlRows>(op, chunk, NPO_TRANSFORM());
  rows.ref_logits = logits_of(ref_chunk, NPO_TRANSFORM(ref_));
  STD_TORCH_CHECK(lse.has_value() == ref_lse.has_value(), op, ": lse and ref_lse come together");
  std::optional<Tensor> dense, ref_dense;
  rows.lse = rows.ref_lse = nullptr;
  if (lse) {
    for (const Tensor& values : {*lse, *ref_lse}) {
      STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == count &&
                          values.scalar_type() == opmath_of(rows.dtype),
                      op, ": lse and ref_lse must be (", count, ",) in the dtype of kl");
    }
    dense = torch::stable::contiguous(*lse);
    ref_dense = torch::stable::contiguous(*ref_lse);
    rows.lse = dense->data_ptr();
    rows.ref_lse = ref_dense->data_ptr();
  }
  Tensor kl = torch::stable::new_empty(logits, {count}, opmath_of(rows.dtype));
  rows.kl = kl.data_ptr();
  kernels().row_kl(rows, parallel_for);
  if (rows.logits.data != logits.data_ptr()) torch::stable::copy_(logits, chunk);
  return kl;
}

}  // namespace
}  // namespace npo_fast

STABLE_TORCH_LIBRARY_IMPL(npo_fast, CPU, m) {
  m.impl("row_log_probs", TORCH_BOX(&npo_fast::row_log_probs));
  m.impl("row_gradient_", TORCH_BOX(&npo_fast::row_gradient_));
  m.impl("tile_log_probs_", TORCH_BOX(&npo_fast::tile_log_probs_));
  m.impl("row_kl_", TORCH_BOX(&npo_fast::row_kl_));
}
