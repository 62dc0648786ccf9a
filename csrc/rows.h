// Rows of channels: read as float (as double where anything is double), computed on, and rounded once when written.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <algorithm>
#include <memory>
#include <vector>

namespace pcf {

using at::Tensor;
using at::vec::Vectorized;
using OptionalTensor = std::optional<Tensor>;

#define PCF_INLINE inline __attribute__((always_inline))

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread

// Two registers of A: what one register of a 16-bit type widens to.
template <class A>
struct Lanes {
  static constexpr int64_t half = Vectorized<A>::size(), size = 2 * half;
  Vectorized<A> lo, hi;

  // From p, n <= size of them; the rest are 0.
  template <class T>
  static PCF_INLINE Lanes load(const T* p, int64_t n = size) {
    if constexpr (std::is_same_v<T, A>) {
      if (n == size) return {Vectorized<A>::loadu(p), Vectorized<A>::loadu(p + half)};
      A some[size] = {};
      std::copy_n(p, n, some);
      return {Vectorized<A>::loadu(some), Vectorized<A>::loadu(some + half)};
    } else if constexpr (std::is_same_v<A, float> && c10::is_reduced_floating_point_v<T>) {
      T some[size] = {};
      if (n < size) p = std::copy_n(p, n, some) - n;
      Lanes v;
      at::vec::load_to_float<T>(p, v.lo, v.hi);
      return v;
    } else {
      A some[size] = {};
      std::copy_n(p, n, some);
      return {Vectorized<A>::loadu(some), Vectorized<A>::loadu(some + half)};
    }
  }

  template <class T>
  PCF_INLINE void store(T* p, int64_t n = size) const {
    if constexpr (std::is_same_v<A, float> && c10::is_reduced_floating_point_v<T>) {
      if (n == size) {
        narrow<T>().store(p);
        return;
      }
      T some[size];
      narrow<T>().store(some);
      std::copy_n(some, n, p);
    } else {
      A some[size];
      A* to = std::is_same_v<T, A> && n == size ? reinterpret_cast<A*>(p) : some;
      lo.store(to);
      hi.store(to + half);
      if (to == some) std::transform(some, some + n, p, [](A v) { return static_cast<T>(v); });
    }
  }

  // Rounded to nearest, ties to even, in one register. Where the CPU has an instruction for bfloat16, which takes numbers
  // below 2^-126 for 0, it is a tenth of the work.
  template <class T>
  PCF_INLINE Vectorized<T> narrow() const {
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, c10::BFloat16>)
      return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(static_cast<__m512>(hi), static_cast<__m512>(lo)));
    else
#endif
      return at::vec::convert_from_float<T>(lo, hi);
  }

  // Lanes from n on are 0.
  PCF_INLINE Lanes first(int64_t n) const {
    if (n == size) return *this;
    auto zero = Vectorized<A>(0);
    return {Vectorized<A>::set(zero, lo, std::min(n, half)), Vectorized<A>::set(zero, hi, std::max<int64_t>(n - half, 0))};
  }

  PCF_INLINE A sum() const {
    auto add = [](Vectorized<A>& x, Vectorized<A>& y) { return x + y; };
    return at::vec::vec_reduce_all<A>(add, lo + hi);
  }

  PCF_INLINE Lanes operator+(const Lanes& o) const { return {lo + o.lo, hi + o.hi}; }
  PCF_INLINE Lanes operator-(const Lanes& o) const { return {lo - o.lo, hi - o.hi}; }
  PCF_INLINE Lanes operator*(const Lanes& o) const { return {lo * o.lo, hi * o.hi}; }
  // a * b + c
  static PCF_INLINE Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
    return {at::vec::fmadd(a.lo, b.lo, c.lo), at::vec::fmadd(a.hi, b.hi, c.hi)};
  }
  // As it is after it has been stored as T.
  template <class T>
  PCF_INLINE Lanes rounded() const {
    if constexpr (std::is_same_v<A, float> && c10::is_reduced_floating_point_v<T>) {
      auto [l, h] = at::vec::convert_to_float<T>(narrow<T>());
      return {l, h};
    } else {
      return *this;
    }
  }
  static PCF_INLINE Lanes all(A v) { return {Vectorized<A>(v), Vectorized<A>(v)}; }
};

// f(i, n) for pieces [i, i + n) of a row, n = Lanes<A>::size, a constant, but for the last one.
template <class A, class F>
PCF_INLINE void pieces(int64_t channels, const F& f) {
  constexpr std::integral_constant<int64_t, Lanes<A>::size> size;
  int64_t i = 0;
  for (; i + size <= channels; i += size) f(i, size);
  if (i < channels) f(i, channels - i);
}

template <class A, class T>
void read_row(A* row, const void* from, int64_t channels) {
  auto p = static_cast<const T*>(from);
  pieces<A>(channels, [&](int64_t i, auto n) { Lanes<A>::load(p + i, n).store(row + i, n); });
}

// row += factor * from; no factor: 1
template <class A, class T>
void add_row(A* row, const void* from, const A* factor, int64_t channels) {
  auto p = static_cast<const T*>(from);
  pieces<A>(channels, [&](int64_t i, auto n) {
    auto v = Lanes<A>::load(p + i, n);
    if (factor) v = v * Lanes<A>::load(factor + i, n);
    (Lanes<A>::load(row + i, n) + v).store(row + i, n);
  });
}

template <class A, class T>
void write_row(void* to, const A* row, int64_t channels) {
  auto p = static_cast<T*>(to);
  pieces<A>(channels, [&](int64_t i, auto n) { Lanes<A>::load(row + i, n).store(p + i, n); });
}

// Asks for a row that is read soon: what a matrix product has written is in no cache.
inline void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}
constexpr int64_t AHEAD = 3;  // rows

// A tensor of rows (..., C), contiguous, that are read as A. Nothing where there is no tensor.
template <class A>
class Input {
 public:
  explicit Input(const OptionalTensor& t) {
    if (!t || !t->defined()) return;
    channels_ = t->size(-1), bytes_ = channels_ * t->element_size();
    data_ = static_cast<const char*>(t->const_data_ptr());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, t->scalar_type(), "rows", [&] {
      read_ = read_row<A, scalar_t>, add_ = add_row<A, scalar_t>;
    });
  }
  explicit operator bool() const { return read_ != nullptr; }
  void read(A* row, int64_t i) const { read_(row, data_ + i * bytes_, channels_); }
  void add(A* row, int64_t i, const A* factor = nullptr) const { add_(row, data_ + i * bytes_, factor, channels_); }
  const void* at(int64_t i) const { return read_ ? data_ + i * bytes_ : nullptr; }
  void ask_for(int64_t i) const {
    if (read_) prefetch(data_ + i * bytes_, bytes_);
  }

 private:
  const char* data_ = nullptr;
  int64_t channels_ = 0, bytes_ = 0;
  void (*read_)(A*, const void*, int64_t) = nullptr;
  void (*add_)(A*, const void*, const A*, int64_t) = nullptr;
};

// A tensor of rows (..., C), contiguous, that are written. Nothing where it has no elements.
template <class A>
class Output {
 public:
  explicit Output(const Tensor& t) {
    if (!t.numel()) return;
    channels_ = t.size(-1), bytes_ = channels_ * t.element_size();
    data_ = static_cast<char*>(t.mutable_data_ptr());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, t.scalar_type(), "rows", [&] { write_ = write_row<A, scalar_t>; });
  }
  explicit operator bool() const { return write_ != nullptr; }
  void write(int64_t i, const A* row) const { write_(data_ + i * bytes_, row, channels_); }
  void* at(int64_t i) const { return write_ ? data_ + i * bytes_ : nullptr; }

 private:
  char* data_ = nullptr;
  int64_t channels_ = 0, bytes_ = 0;
  void (*write_)(void*, const A*, int64_t) = nullptr;
};

// A vector (C,) as A; empty where there is none.
template <class A>
std::vector<A> vector_of(const OptionalTensor& t, int64_t channels) {
  if (!t || !t->defined()) return {};
  TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == channels, "vectors must have shape (", channels, ",), got ", t->sizes());
  std::vector<A> values(channels);
  if (channels) Input<A>(t->contiguous()).read(values.data(), 0);
  return values;
}

template <class A>
const A* data_or_null(const std::vector<A>& values) {
  return values.empty() ? nullptr : values.data();
}

// The dtype of a sum as torch promotes it.
inline at::ScalarType promoted(const Tensor& x, std::initializer_list<OptionalTensor> more) {
  auto dtype = x.scalar_type();
  for (auto& t : more)
    if (t && t->defined()) dtype = c10::promoteTypes(dtype, t->scalar_type());
  return dtype;
}

// f(A{}) with A = double if one of these is double, else float.
template <class F>
void with_accumulator(std::initializer_list<at::ScalarType> dtypes, const F& f) {
  if (std::find(dtypes.begin(), dtypes.end(), at::kDouble) != dtypes.end()) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace pcf
