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

// Rows a thread takes at least. A row is one thread's: the result does not depend on how many
// threads there are.
int64_t grain(int64_t vocabulary) { return vocabulary < GRAIN ? GRAIN / (vocabulary + 1) + 1 : 1; }

Dtype dtype_of(const char* op, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return Dtype::fp32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::fp16;
    case ScalarType::Double: return Dtype::fp64;
    default: STD_TORCH_CHECK(false, op, ": logits must be float32, bfloat16, float16 or float64");
  }
}

// Rows may be strided, columns may not: the copy is for layouts that no caller here makes.
bool has_dense_rows(const Tensor& logits) { return logits.size(1) <= 1 || logits.stride(1) == 1; }

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
  const bool dense_rows = has_dense_rows(logits);
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

  torch::stable::parallel_for(
      0, count, grain(vocabulary),
      [&](int64_t first, int64_t last) { kernels().log_probs(rows, first, last); });
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

Tensor row_kl_(Tensor logits, Tensor ref_logits, std::optional<double> softcap, double logit_scale,
               std::optional<double> ref_softcap, double ref_logit_scale) {
  const char* op = "row_kl_";
  STD_TORCH_CHECK(logits.dim() == 2 && ref_logits.dim() == 2 &&
                      logits.size(0) == ref_logits.size(0) && logits.size(1) == ref_logits.size(1),
                  op, ": logits and ref_logits must be (R, V) of one shape");
  STD_TORCH_CHECK(logits.scalar_type() == ref_logits.scalar_type(), op,
                  ": logits and ref_logits must have one dtype");
  const int64_t count = logits.size(0), vocabulary = logits.size(1);
  const bool dense_rows = has_dense_rows(logits);
  Tensor chunk = dense_rows ? logits : torch::stable::contiguous(logits);
  Tensor ref = has_dense_rows(ref_logits) ? ref_logits : torch::stable::contiguous(ref_logits);

  KlRows rows{};
  rows.dtype = dtype_of(op, logits);
  const auto wide = rows.dtype == Dtype::fp64 ? ScalarType::Double : ScalarType::Float;
  Tensor kl = torch::stable::new_empty(logits, {count}, wide);
  rows.logits = {chunk.data_ptr(), chunk.stride(0), softcap.value_or(0), logit_scale};
  rows.ref_logits = {ref.data_ptr(), ref.stride(0), ref_softcap.value_or(0), ref_logit_scale};
  rows.vocabulary = vocabulary;
  rows.kl = kl.data_ptr();
  torch::stable::parallel_for(
      0, count, grain(vocabulary),
      [&](int64_t first, int64_t last) { kernels().kl(rows, first, last); });
  if (!dense_rows) torch::stable::copy_(logits, chunk);
  return kl;
}

}  // namespace
}  // namespace npo_fast

STABLE_TORCH_LIBRARY_IMPL(npo_fast, CPU, m) {
  m.impl("row_log_probs_", TORCH_BOX(&npo_fast::row_log_probs_));
  m.impl("row_log_probs", TORCH_BOX(&npo_fast::row_log_probs));
  m.impl("row_kl_", TORCH_BOX(&npo_fast::row_kl_));
}
