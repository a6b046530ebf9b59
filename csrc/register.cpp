// The operators of npo_fast/kernels/reference.py for the CPU, through PyTorch's stable C++ ABI:
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

constexpr int64_t GRAIN = 1 << 15;  // logits below which a second thread costs more than it saves

// The widest the processor has; PyTorch's own variable ATEN_CPU_CAPABILITY caps it.
RowKernel row_kernel() {
#ifdef NPO_X86
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = cap ? cap : "avx512";
  if (most == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::row_log_probs;
  }
  if (most != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::row_log_probs;
  }
#endif
  return plain::row_log_probs;
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

std::tuple<Tensor, Tensor> run(const char* op, const Tensor& logits, const Tensor& labels,
                               const std::optional<Tensor>& target_logits,
                               std::optional<double> softcap, double logit_scale, bool gradient) {
  STD_TORCH_CHECK(logits.dim() == 2, op, ": logits must be (R, V), got ", logits.dim(), " dims");
  const int64_t count = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
                      labels.size(0) == count,
                  op, ": labels must be (", count, ",) int64, one a row of logits");
  STD_TORCH_CHECK(!target_logits || (target_logits->dim() == 1 && target_logits->size(0) == count),
                  op, ": target_logits must be (", count, ",), one a row of logits");

  Rows rows{};
  rows.dtype = dtype_of(op, logits);
  const auto wide = rows.dtype == Dtype::fp64 ? ScalarType::Double : ScalarType::Float;
  Tensor log_probs = torch::stable::new_empty(logits, {count}, wide);
  Tensor lse = torch::stable::new_empty(logits, {count}, wide);

  const Tensor dense_labels = torch::stable::contiguous(labels);
  std::optional<Tensor> targets;
  if (target_logits) {
    targets = torch::stable::contiguous(torch::stable::to(*target_logits, wide));
  }
  // rows may be strided, columns may not: the copy is for layouts that no caller here makes
  const bool dense_rows = vocabulary <= 1 || logits.stride(1) == 1;
  Tensor chunk = dense_rows ? logits : torch::stable::contiguous(logits);

  rows.logits = chunk.data_ptr();
  rows.stride = chunk.stride(0);
  rows.vocabulary = vocabulary;
  rows.labels = static_cast<const int64_t*>(dense_labels.data_ptr());
  rows.target_logits = targets ? targets->data_ptr() : nullptr;
  rows.softcap = softcap.value_or(0);
  rows.logit_scale = logit_scale;
  rows.log_probs = log_probs.data_ptr();
  rows.lse = lse.data_ptr();
  rows.gradient = gradient;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t label = rows.labels[row];
    STD_TORCH_CHECK(label >= 0 && label < vocabulary, op, ": labels[", row, "] = ", label,
                    " is outside the vocabulary [0, ", vocabulary, ")");
  }

  static const RowKernel kernel = row_kernel();
  const int64_t grain = vocabulary < GRAIN ? GRAIN / (vocabulary + 1) + 1 : 1;
  // a row is one thread's: the result does not depend on how many there are
  torch::stable::parallel_for(
      0, count, grain, [&](int64_t first, int64_t last) { kernel(rows, first, last); });
  if (gradient && !dense_rows) {
    Tensor destination = logits;
    torch::stable::copy_(destination, chunk);
  }
  return {log_probs, lse};
}

std::tuple<Tensor, Tensor> row_log_probs_(Tensor logits, Tensor labels,
                                          std::optional<Tensor> target_logits,
                                          std::optional<double> softcap, double logit_scale) {
  return run("row_log_probs_", logits, labels, target_logits, softcap, logit_scale, true);
}

std::tuple<Tensor, Tensor> row_log_probs(Tensor logits, Tensor labels,
                                         std::optional<Tensor> target_logits,
                                         std::optional<double> softcap, double logit_scale) {
  return run("row_log_probs", logits, labels, target_logits, softcap, logit_scale, false);
}

}  // namespace
}  // namespace npo_fast

STABLE_TORCH_LIBRARY_IMPL(npo_fast, CPU, m) {
  m.impl("row_log_probs_", TORCH_BOX(&npo_fast::row_log_probs_));
  m.impl("row_log_probs", TORCH_BOX(&npo_fast::row_log_probs));
}
