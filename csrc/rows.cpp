// z_n        = logit_scale * softcap * tanh(a_n / softcap)      (softcap optional)
// log_prob_n = z_n[y_n] - logsumexp(z_n)
// a_n        <- g_n * (onehot(y_n) - softmax(z_n)) * d z_n / d a_n
//
// A chunk lies column after column, so the lanes of a vector are rows: each keeps a max and a sum
// of its own, and nothing is added up across a vector. Tiles of TILE_COLUMNS by TILE_ROWS go to any
// thread; their sums are joined in the order of the columns, so the result does not depend on how
// many threads there are.
//
// Two passes over the chunk: an online max and sum, then the gradient. Exponentials are computed
// twice because a second one costs less than a third trip through memory. The label is kept apart
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

constexpr int64_t TILE_COLUMNS = 256;  // summed in the dtype of z, before fp64 takes over
constexpr int64_t TILE_ROWS = 512;     // whose running max and sum stay in L1, beside ...
constexpr int64_t DEPTH = 8;           // ... this many columns of z, which share one max
constexpr int64_t GRAIN = 1 << 15;  // logits below which a second thread costs more than it saves

double higher(double a, double b) { return a > b ? a : b; }
double lower(double a, double b) { return a > b ? b : a; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Uninitialised; vectors may be loaded up to the end and beyond.
template <class F>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(new F[count + lanes<F>]) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { delete[] data_; }
  F* at(int64_t index) const { return data_ + index; }
  F& operator[](int64_t index) const { return data_[index]; }

 private:
  F* data_;
};

template <class Each>
void for_each(ParallelFor parallel_for, int64_t count, int64_t logits_each, const Each& each) {
  const auto body = [](const void* context, int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) (*static_cast<const Each*>(context))(index);
  };
  parallel_for(count, GRAIN / (logits_each + 1) + 1, body, &each);
}

// The part of the logits that one thread goes through at a time: some rows of a slice.
struct Tile {
  int64_t slice;  // counted from 0
  int64_t row, rows, column, columns;
};

template <class Each>
void for_tiles(ParallelFor parallel_for, const Rows& all, const Each& each) {
  const int64_t row_tiles = parts(all.rows, TILE_ROWS), slices = parts(all.columns, TILE_COLUMNS);
  const int64_t logits = least(all.rows, TILE_ROWS) * least(all.columns, TILE_COLUMNS);
  for_each(parallel_for, row_tiles * slices, logits, [&](int64_t index) {
    const int64_t slice = index / row_tiles, column = slice * TILE_COLUMNS;
    const int64_t row = index % row_tiles * TILE_ROWS;
    const int64_t rows = least(TILE_ROWS, all.rows - row);
    each(Tile{slice, row, rows, column, least(TILE_COLUMNS, all.columns - column)});
  });
}

template <class T>
Vector<Opmath<T>> load_up_to(const T* from, int64_t count) {
  return count < lanes<Opmath<T>> ? load_first(from, count) : load(from);
}

template <class T>
void store_up_to(T* to, Vector<Opmath<T>> value, int64_t count) {
  count < lanes<Opmath<T>> ? store_first(to, value, count) : store(to, value);
}

// Columns lie apart: the hardware does not see the next one coming. Harmless beyond the end.
template <class T>
void fetch(const T* from) {
  __builtin_prefetch(from);
}

// exp(z - shift) is 0, not NaN, while every z is -inf
template <class F>
Vector<F> shift_of(Vector<F> max) {
  return max == F(-INFINITY) ? Vector<F>{} : max;
}

// logsumexp = max + log(sum)
struct LogSumExp {
  double max = -INFINITY;
  double sum = 0;

  double shift() const { return max == -INFINITY ? 0 : max; }
  double value() const { return max + ::log(sum); }
};

// Of each row and slice, the largest z and the sum of exp(z - max); labels are left out.
template <class T, bool capped>
class SliceSums {
  using F = Opmath<T>;

 public:
  SliceSums(ParallelFor parallel_for, const Rows& all, const Logits& logits, const int64_t* labels)
      : rows_(all.rows),
        slices_(parts(all.columns, TILE_COLUMNS)),
        max_(rows_ * slices_),
        sum_(rows_ * slices_) {
    const Activation<F, capped> activation(logits.transform);
    for_tiles(parallel_for, all,
              [&](const Tile& tile) { add(tile, logits, activation, labels); });
  }

  LogSumExp of_row(int64_t row) const {
    LogSumExp total;
    for (int64_t at = row; at < rows_ * slices_; at += rows_) {
      total.max = higher(total.max, max_[at]);
    }
    for (int64_t at = row; at < rows_ * slices_; at += rows_) {
      total.sum += sum_[at] * ::exp(max_[at] - total.shift());
    }
    return total;
  }

 private:
  // A NaN reaches the sum although no comparison in the max lets it through; so does +inf, as
  // inf - inf.
  void add(const Tile& tile, const Logits& logits, const Activation<F, capped>& activation,
           const int64_t* labels) {
    alignas(64) F z[DEPTH][TILE_ROWS];
    alignas(64) F max[TILE_ROWS], sum[TILE_ROWS];
    for (int64_t row = 0; row < TILE_ROWS; ++row) max[row] = -INFINITY, sum[row] = 0;
    int64_t labelled[TILE_ROWS], count = 0;  // rows whose label lies in the slice
    for (int64_t row = 0; labels && row < tile.rows; ++row) {
      const int64_t column = labels[tile.row + row] - tile.column;
      if (column >= 0 && column < tile.columns) labelled[count++] = row;
    }

    for (int64_t first = 0; first < tile.columns; first += DEPTH) {
      const int64_t depth = least(DEPTH, tile.columns - first);
      for (int64_t k = 0; k < DEPTH; ++k) {
        const T* column = static_cast<const T*>(logits.data) +
                          (tile.column + first + k) * logits.stride + tile.row;
        for (int64_t at = 0; at < tile.rows; at += lanes<F>) {
          store(z[k] + at, k < depth ? activation(load_up_to(column + at, tile.rows - at)).z
                                     : broadcast(F(-INFINITY)));
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = labels[tile.row + labelled[i]] - tile.column - first;
        if (k >= 0 && k < depth) z[k][labelled[i]] = -INFINITY;
      }
      const T* next = static_cast<const T*>(logits.data) +
                      (tile.column + first + DEPTH) * logits.stride + tile.row;
      for (int64_t at = 0; at < tile.rows; at += lanes<F>) {
        const Vector<F> before = load(max + at);
        Vector<F> most = before;
        for (int64_t k = 0; k < DEPTH; ++k) {
          const Vector<F> value = load(z[k] + at);
          most = value > most ? value : most;
        }
        const Vector<F> shift = shift_of<F>(most);
        Vector<F> terms[2] = {};
        for (int64_t k = 0; k < DEPTH; ++k) {
          fetch(next + k * logits.stride + at);
          terms[k % 2] += exp(load(z[k] + at) - shift);
        }
        store(max + at, most);
        store(sum + at, load(sum + at) * exp(before - shift) + (terms[0] + terms[1]));
      }
    }
    const int64_t to = tile.slice * rows_ + tile.row;
    memcpy(max_.at(to), max, tile.rows * sizeof(F));
    memcpy(sum_.at(to), sum, tile.rows * sizeof(F));
  }

  int64_t rows_, slices_;
  Scratch<F> max_, sum_;
};

template <class T, bool capped>
void row_log_probs(const WholeRows& rows, ParallelFor parallel_for) {
  using F = Opmath<T>;
  const Activation<F, capped> activation(rows.logits.transform);
  const T* logits = static_cast<const T*>(rows.logits.data);
  const SliceSums<T, capped> sums(parallel_for, rows, rows.logits, rows.labels);
  for_each(parallel_for, rows.rows, rows.columns, [&](int64_t row) {
    const T* raw = logits + rows.labels[row] * rows.logits.stride + row;
    const Vector<F> target =
        activation(rows.target_logits ? broadcast(static_cast<const F*>(rows.target_logits)[row])
                                      : load_first(raw, 1)).z;
    const LogSumExp others = sums.of_row(row);
    const double z = target[0], rest = others.value();
    const double above = ::log1p(::exp(lower(rest, z) - higher(rest, z)));
    const double lse = higher(rest, z) + above;
    const double log_prob = (z - higher(rest, z)) - above;  // NaN for z = +inf, as it should be
    static_cast<F*>(rows.log_probs)[row] = F(log_prob);
    static_cast<F*>(rows.lse)[row] = F(lse);
    static_cast<F*>(rows.shift)[row] = F(others.shift());
    static_cast<F*>(rows.share)[row] = F(::exp(others.shift() - lse));
  });
}

template <class T, bool capped>
void row_gradient(const GradientRows& rows, ParallelFor parallel_for) {
  using F = Opmath<T>;
  const Activation<F, capped> activation(rows.logits.transform);
  T* logits = static_cast<T*>(rows.logits.data);
  const int64_t stride = rows.logits.stride;
  const F *log_probs = static_cast<const F*>(rows.log_probs), *g = static_cast<const F*>(rows.g);
  const F* share = static_cast<const F*>(rows.share);
  const Scratch<F> shift(rows.rows), factor(rows.rows);
  for (int64_t row = 0; row < rows.rows; ++row) {
    shift[row] = static_cast<const F*>(rows.shift)[row];
    factor[row] = -share[row] * g[row];
  }
  for_tiles(parallel_for, rows, [&](const Tile& tile) {
    alignas(64) F at_label[TILE_ROWS];  // before the logits are overwritten
    int64_t labelled[TILE_ROWS], count = 0;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t label = rows.labels[tile.row + row];
      if (label < tile.column || label >= tile.column + tile.columns) continue;
      const T* raw = logits + label * stride + tile.row + row;
      const F slope = activation(load_first(raw, 1)).slope[0];
      const F rest = F(-::expm1(double(log_probs[tile.row + row])));  // 1 - p does not cancel
      at_label[count] = g[tile.row + row] * rest * slope;
      labelled[count++] = tile.row + row;
    }
    for (int64_t column = tile.column; column < tile.column + tile.columns; ++column) {
      T* to = logits + column * stride + tile.row;
      for (int64_t at = 0; at < tile.rows; at += lanes<F>) {
        fetch(to + DEPTH * stride + at);
        const auto [z, slope] = activation(load_up_to(to + at, tile.rows - at));
        const Vector<F> p =
            exp(z - load(shift.at(tile.row + at))) * load(factor.at(tile.row + at));
        store_up_to(to + at, p * slope, tile.rows - at);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = labelled[i];
      store_first(logits + rows.labels[row] * stride + row, broadcast(at_label[i]), 1);
    }
  });
}

template <class T, bool capped>
void tile_log_probs(const TileRows& rows, ParallelFor parallel_for) {
  using F = Opmath<T>;
  const Activation<F, capped> activation(rows.logits.transform);
  const SliceSums<T, capped> sums(parallel_for, rows, rows.logits, rows.labels);
  for_each(parallel_for, rows.rows, rows.columns, [&](int64_t row) {
    const int64_t label = rows.labels[row];
    if (label >= 0 && label < rows.columns) {
      const T* raw = static_cast<const T*>(rows.logits.data) + label * rows.logits.stride + row;
      rows.target[row] = activation(load_first(raw, 1)).z[0];
    }
    const double before = rows.others[row], tile = sums.of_row(row).value();
    const double high = higher(before, tile);
    if (high != -INFINITY) {
      rows.others[row] = high + ::log1p(::exp(lower(before, tile) - high));
    }
  });
}

template <class F>
struct KlTerm {
  Vector<F> value, gradient;  // gradient in the raw logit
};

template <class T, bool capped, bool ref_capped>
void row_kl(const KlRows& rows, ParallelFor parallel_for) {
  using F = Opmath<T>;
  const Activation<F, capped> activation(rows.logits.transform);
  const Activation<F, ref_capped> ref_activation(rows.ref_logits.transform);
  const Scratch<F> shift(rows.rows), share(rows.rows), lse_difference(rows.rows);
  const Scratch<F> ref_shift(rows.rows), ref_share(rows.rows);
  if (rows.lse != nullptr) {
    const F *lse = static_cast<const F*>(rows.lse), *ref_lse = static_cast<const F*>(rows.ref_lse);
    for (int64_t row = 0; row < rows.rows; ++row) {
      shift[row] = lse[row];
      ref_shift[row] = ref_lse[row];
      share[row] = ref_share[row] = 1;
      lse_difference[row] = lse[row] - ref_lse[row];
    }
  } else {
    const SliceSums<T, capped> sums(parallel_for, rows, rows.logits, nullptr);
    const SliceSums<T, ref_capped> ref_sums(parallel_for, rows, rows.ref_logits, nullptr);
    for_each(parallel_for, rows.rows, rows.columns, [&](int64_t row) {
      const LogSumExp total = sums.of_row(row), ref_total = ref_sums.of_row(row);
      shift[row] = F(total.shift());
      share[row] = F(::exp(total.shift() - total.value()));
      ref_shift[row] = F(ref_total.shift());
      ref_share[row] = F(::exp(ref_total.shift() - ref_total.value()));
      lse_difference[row] = F(total.value() - ref_total.value());
    });
  }

  const auto term = [&](Vector<F> raw, Vector<F> ref_raw, int64_t row) -> KlTerm<F> {
    const auto [z, slope] = activation(raw);
    const Vector<F> ref_z = ref_activation(ref_raw).z;
    const Vector<F> p = exp(z - load(shift.at(row))) * load(share.at(row));
    const Vector<F> p_ref = exp(ref_z - load(ref_shift.at(row))) * load(ref_share.at(row));
    const Vector<F> x = (z - ref_z) - load(lse_difference.at(row));
    const auto near = absolute<F>(x) < F(0.34);
    const Vector<F> tail = p_ref * exp_tail(near ? x : Vector<F>{});
    const Vector<F> difference = near ? p_ref * x + tail : p - p_ref;
    const Vector<F> value = near ? tail : difference - p_ref * x;
    return {p_ref == 0 ? p : value, difference * slope};  // 0 * log 0 = 0
  };
  const int64_t slices = parts(rows.columns, TILE_COLUMNS);
  const Scratch<F> slice_kl(rows.rows * slices);
  for_tiles(parallel_for, rows, [&](const Tile& tile) {
    alignas(64) F kl[TILE_ROWS] = {};
    for (int64_t first = 0; first < tile.columns; first += DEPTH) {
      const int64_t column = tile.column + first, depth = least(DEPTH, tile.columns - first);
      T* to = static_cast<T*>(rows.logits.data) + column * rows.logits.stride + tile.row;
      const T* ref = static_cast<const T*>(rows.ref_logits.data) +
                     column * rows.ref_logits.stride + tile.row;
      for (int64_t at = 0; at < tile.rows; at += lanes<F>) {
        const int64_t left = tile.rows - at;
        Vector<F> sum{};
        for (int64_t k = 0; k < depth; ++k) {
          const KlTerm<F> kl_term = term(load_up_to(to + k * rows.logits.stride + at, left),
                                     load_up_to(ref + k * rows.ref_logits.stride + at, left),
                                     tile.row + at);
          sum += kl_term.value;
          store_up_to(to + k * rows.logits.stride + at, kl_term.gradient, left);
        }
        store(kl + at, load(kl + at) + sum);
      }
    }
    memcpy(slice_kl.at(tile.slice * rows.rows + tile.row), kl, tile.rows * sizeof(F));
  });
  for_each(parallel_for, rows.rows, slices, [&](int64_t row) {
    double kl = 0;
    for (int64_t slice = 0; slice < slices; ++slice) kl += slice_kl[slice * rows.rows + row];
    static_cast<F*>(rows.kl)[row] = F(kl);
  });
}

// kernel(whether there is a softcap), known to the compiler
template <class Kernel>
void by_softcap(const Logits& logits, Kernel kernel) {
  logits.transform.capped() ? kernel(std::true_type{}) : kernel(std::false_type{});
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

void any_row_log_probs(const WholeRows& rows, ParallelFor parallel_for) {
  specialised(rows, [&](auto zero, auto capped) {
    row_log_probs<decltype(zero), capped>(rows, parallel_for);
  });
}

void any_row_gradient(const GradientRows& rows, ParallelFor parallel_for) {
  specialised(rows, [&](auto zero, auto capped) {
    row_gradient<decltype(zero), capped>(rows, parallel_for);
  });
}

void any_tile_log_probs(const TileRows& rows, ParallelFor parallel_for) {
  specialised(rows, [&](auto zero, auto capped) {
    tile_log_probs<decltype(zero), capped>(rows, parallel_for);
  });
}

void any_row_kl(const KlRows& rows, ParallelFor parallel_for) {
  specialised(rows, [&](auto zero, auto capped) {
    by_softcap(rows.ref_logits, [&](auto ref_capped) {
      row_kl<decltype(zero), capped, ref_capped>(rows, parallel_for);
    });
  });
}

}  // namespace

namespace NPO_ISA {
extern const Kernels kernels = {any_row_log_probs, any_row_gradient, any_tile_log_probs,
                                any_row_kl};
}

}  // namespace npo_fast
