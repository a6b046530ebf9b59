// Vectors of NPO_LANE_BYTES bytes, and exp and tanh on them.
//
// Compiler vectors instead of intrinsics: one text serves AVX2, AVX-512, SSE2 and NEON. All of it
// has internal linkage, so that the linker cannot let code for AVX stand in for the plain copy.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

namespace {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(NPO_LANE_BYTES)));
  static constexpr int lanes = NPO_LANE_BYTES / sizeof(T);
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int lanes = VectorOf<T>::lanes;

using Float = Vector<float>;
using Double = Vector<double>;
using Bits = Vector<uint32_t>;
typedef uint16_t HalfBits __attribute__((vector_size(NPO_LANE_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The opmath dtype: a logit is computed with in it.
template <class T>
struct OpmathOf {
  using type = float;
};
template <>
struct OpmathOf<double> {
  using type = double;
};
template <class T>
using Opmath = typename OpmathOf<T>::type;

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class F>
Vector<F> broadcast(F value) {
  return value - Vector<F>{};
}

// ---- widening loads and rounding stores (to nearest, ties to even; NaN stays NaN) ----

Float widen(HalfBits bits, BFloat16) {
  return bit_cast<Float>(__builtin_convertvector(bits, Bits) << 16);
}

Float widen(HalfBits bits, Half) {
  const Bits half = __builtin_convertvector(bits, Bits);
  const Bits magnitude = (half & 0x7fff) << 13;
  // the exponents differ by 112; the product also normalises what is subnormal in fp16
  const Bits finite = bit_cast<Bits>(bit_cast<Float>(magnitude) * 0x1p112f);
  const Bits value = (half & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : finite;
  return bit_cast<Float>(value | (half & 0x8000) << 16);
}

HalfBits narrow(Float value, BFloat16) {
  const Bits bits = bit_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(value == value ? rounded : bits >> 16 | 0x40, HalfBits);
}

HalfBits narrow(Float value, Half) {
  const Bits bits = bit_cast<Bits>(value);
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // one unit in the last place of 0.5f is the smallest subnormal of fp16: the sum rounds to it
  const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000u;
  Bits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000), HalfBits);
}

template <class T>
Float load(const T* from) {
  HalfBits bits;
  memcpy(&bits, from, sizeof(bits));
  return widen(bits, T{});
}
template <class T>
void store(T* to, Float value) {
  const HalfBits bits = narrow(value, T{});
  memcpy(to, &bits, sizeof(bits));
}
Float load(const float* from) {
  Float value;
  memcpy(&value, from, sizeof(value));
  return value;
}
void store(float* to, Float value) { memcpy(to, &value, sizeof(value)); }
Double load(const double* from) {
  Double value;
  memcpy(&value, from, sizeof(value));
  return value;
}
void store(double* to, Double value) { memcpy(to, &value, sizeof(value)); }

// The last `count` elements of a row, fewer than a vector holds; the other lanes are 0.
template <class T>
Vector<Opmath<T>> load_first(const T* from, int64_t count) {
  T padded[lanes<Opmath<T>>] = {};
  memcpy(padded, from, count * sizeof(T));
  return load(padded);
}
template <class T>
void store_first(T* to, Vector<Opmath<T>> value, int64_t count) {
  T padded[lanes<Opmath<T>>];
  store(padded, value);
  memcpy(to, padded, count * sizeof(T));
}

// ---- functions ----

// exp(x) - 1 - x for |x| <= log(2) / 2, accurate relative to itself and never negative.
Float exp_tail(Float x) {
  // minimax for the tail over x^2, relative error of exp 3e-9
  Float p = x * 0.0013814467f + 0.008368781f;
  p = p * x + 0.041668393f;
  p = p * x + 0.1666652f;
  p = p * x + 0.49999994f;
  return p * (x * x);
}

Double exp_tail(Double x) {
  for (int lane = 0; lane < lanes<double>; ++lane) {
    const double tail = ::expm1(x[lane]) - x[lane];
    x[lane] = tail < 0 ? 0 : tail;
  }
  return x;
}

// exp(x) for x <= 0, within 1 ulp; 0 below the normal numbers, NaN for NaN. (A small positive x
// is as accurate; from 88 on the result is meaningless.)
Float exp(Float x) {
  constexpr float log2e = 0x1.715476p+0f;
  constexpr float ln2_high = 0x1.62e4p-1f;  // 15 bits: n * ln2_high is exact
  constexpr float ln2_low = 0x1.7f7d1cp-20f;
  constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Float shifted = x * log2e + round;
  const Float n = shifted - round;
  const Float r = (x - n * ln2_high) - n * ln2_low;
  const Float p = exp_tail(r) + r + 1.0f;
  // a product, not an addition to the exponent of p: it keeps a NaN
  const Float power = bit_cast<Float>((bit_cast<Bits>(shifted) << 23) + 0x3f800000u);
  return x < -87.3f ? Float{} : p * power;
}

Double exp(Double x) {
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = ::exp(x[lane]);
  return x;
}

template <class F>
Vector<F> absolute(Vector<F> x) {
  return x < 0 ? -x : x;
}

template <class V>
struct Tanh {
  V value, slope;
};

// tanh(x) and its derivative. Each has a form that cancels near 0 and one that cancels far away.
Tanh<Float> tanh(Float x) {
  const Float magnitude = absolute<float>(x);
  // minimax for (tanh(x) / x - 1) / x^2 on |x| <= 0.625, relative error of tanh 5e-9
  const Float square = x * x;
  Float p = square * -0.0057049864f + 0.020639086f;
  p = p * square + -0.053739715f;
  p = p * square + 0.13331442f;
  p = p * square + -0.3333328f;
  const Float small = x * square * p + x;
  const Float e = exp(magnitude * -2.0f);
  const Float inverse = 1.0f / (1.0f + e);
  const Float large = (1.0f - e) * inverse;
  const auto near = magnitude < 0.625f;
  return {near ? small : (x < 0 ? -large : large),
          near ? 1.0f - small * small : 4.0f * e * inverse * inverse};
}

Tanh<Double> tanh(Double x) {
  Tanh<Double> result;
  for (int lane = 0; lane < lanes<double>; ++lane) {
    const double inverse = 1 / ::cosh(x[lane]);
    result.value[lane] = ::tanh(x[lane]);
    result.slope[lane] = inverse * inverse;
  }
  return result;
}

}  // namespace
