// swiglu: silu(gate) * value, in place or not, and its backward. See ops/swiglu.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rows.h"

namespace pcf {
namespace {

template <class A>
Lanes<A> sigmoid(const Lanes<A>& x) {
  auto one = Vectorized<A>(1);
  return {one / (one + x.lo.neg().exp()), one / (one + x.hi.neg().exp())};
}

// Rows (N, hidden) that are `stride` elements apart, of any dtype.
template <class A>
struct Rows {
  char* data;
  int64_t stride, hidden;  // bytes from row to row; elements of a row
  void (*read)(A*, const void*, int64_t);
  void (*write)(void*, const A*, int64_t);

  // Columns `first` to `first + hidden` of t (rows, more); channels next to each other.
  Rows(const Tensor& t, int64_t rows, int64_t first, int64_t hidden, bool written = false) : hidden(hidden) {
    TORCH_CHECK_VALUE(t.dim() == 2 && (t.size(1) < 2 || t.stride(1) == 1), "rows must be (N, C), got strides ", t.strides());
    TORCH_CHECK_VALUE(t.size(0) == rows && t.size(1) >= first + hidden, "rows must be (", rows, ", ", first + hidden, "), got ", t.sizes());
    auto begin = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    data = static_cast<char*>(begin) + first * t.element_size();
    stride = t.stride(0) * t.element_size();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, t.scalar_type(), "swiglu", [&] {
      read = read_row<A, scalar_t>, write = write_row<A, scalar_t>;
    });
  }
  void get(std::vector<A>& row, int64_t i) const { read(row.data(), data + i * stride, hidden); }
  void put(const std::vector<A>& row, int64_t i) const { write(data + i * stride, row.data(), hidden); }
};

int64_t hidden_of(const Tensor& gate, const OptionalTensor& value) { return value ? gate.size(1) : gate.size(1) / 2; }
int64_t grain(int64_t hidden) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, 2 * hidden)); }

void run(const Tensor& gate, const OptionalTensor& value, const Tensor& out) {
  auto hidden = hidden_of(gate, value);
  if (!out.numel()) return;
  with_accumulator({out.scalar_type()}, [&](auto zero) {
    using A = decltype(zero);
    auto n = gate.size(0);
    Rows<A> gates(gate, n, 0, hidden), values(value ? *value : gate, n, value ? 0 : hidden, hidden), outs(out, n, 0, hidden, true);
    at::parallel_for(0, gate.size(0), grain(hidden), [&](int64_t begin, int64_t end) {
      std::vector<A> g(hidden), v(hidden);
      for (auto row = begin; row < end; ++row) {
        gates.get(g, row);
        values.get(v, row);
        pieces<A>(hidden, [&](int64_t c, auto n) {
          auto x = Lanes<A>::load(g.data() + c, n);
          (x * sigmoid(x) * Lanes<A>::load(v.data() + c, n)).store(g.data() + c, n);
        });
        outs.put(g, row);
      }
    });
  });
}

Tensor swiglu(
    const Tensor& gate,            // (N, hidden), or (N, 2*hidden) with the value in it
    const OptionalTensor& value) {  // (N, hidden)   -> (N, hidden)
  auto out = at::empty({gate.size(0), hidden_of(gate, value)}, gate.options().dtype(promoted(gate, {value})));
  run(gate, value, out);
  return out;
}

void swiglu_(
    Tensor& gate,           // (N, hidden), channels next to each other; written to
    const Tensor& value) {  // (N, hidden)
  run(gate, value, gate);
  if (!gate.is_inference()) gate.unsafeGetTensorImpl()->bump_version();
}

std::vector<Tensor> swiglu_backward(
    const Tensor& grad,            // (N, hidden)
    const Tensor& gate,            // (N, hidden), or (N, 2*hidden)
    const OptionalTensor& value) {  // (N, hidden)   -> gradients of gate, and of value where there is one
  auto hidden = hidden_of(gate, value);
  std::vector<Tensor> grads{at::empty(gate.sizes(), gate.options())};
  if (value) grads.push_back(at::empty(value->sizes(), value->options()));
  if (!grad.numel()) return grads;
  with_accumulator({promoted(grad, {gate, value})}, [&](auto zero) {
    using A = decltype(zero);
    auto n = gate.size(0);
    Rows<A> incoming(grad, n, 0, hidden), gates(gate, n, 0, hidden), values(value ? *value : gate, n, value ? 0 : hidden, hidden);
    Rows<A> of_gate(grads[0], n, 0, hidden, true), of_value(grads.back(), n, value ? 0 : hidden, hidden, true);
    at::parallel_for(0, gate.size(0), grain(hidden), [&](int64_t begin, int64_t end) {
      std::vector<A> d(hidden), g(hidden), v(hidden);
      auto one = Lanes<A>::all(1);
      for (auto row = begin; row < end; ++row) {
        incoming.get(d, row);
        gates.get(g, row);
        values.get(v, row);
        pieces<A>(hidden, [&](int64_t c, auto n) {
          auto up = Lanes<A>::load(d.data() + c, n), x = Lanes<A>::load(g.data() + c, n), y = Lanes<A>::load(v.data() + c, n);
          auto s = sigmoid(x);
          (up * y * s * (one + x * (one - s))).store(g.data() + c, n);
          (up * x * s).store(v.data() + c, n);
        });
        of_gate.put(g, row);
        of_value.put(v, row);
      }
    });
  });
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(planecycle_fast_cpu, CPU, m) {
  m.impl("swiglu", swiglu);
  m.impl("swiglu_", swiglu_);
  m.impl("swiglu_backward", swiglu_backward);
}

}  // namespace pcf
