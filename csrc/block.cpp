// block_: what follows norm1 in a block, for inference: attention and MLP, group by group of sequences, so that what passes
// between layers stays in the caches and costs Python nothing. Made of other operations alone. See groups.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include "rows.h"

namespace pcf {
namespace {

using OptionalTensors = c10::List<std::optional<Tensor>>;

// By the dispatcher, as Python calls them: whoever watches operations sees these too.
template <class Signature>
c10::TypedOperatorHandle<Signature> operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void turn(Tensor x, int64_t num_globals, bool in_table_dtype, at::TensorList sin, at::TensorList cos) {
  using Signature = void(Tensor&, bool, c10::SymInt, c10::SymInt, bool, c10::SymIntArrayRef, at::TensorList, at::TensorList,
                         at::TensorList, const OptionalTensors&, std::string_view, bool, bool, at::ScalarType, at::ScalarType);
  static auto rope = operation<Signature>("planecycle_fast_cpu::rope_");
  std::vector<c10::SymInt> grid;
  for (const auto& table : sin) grid.emplace_back(table.sym_size(0));
  auto dtype = sin[0].scalar_type();
  rope.call(x, false, num_globals, x.sym_size(2), in_table_dtype, grid, sin, cos, {}, OptionalTensors(), "", false, false, dtype, dtype);
}

void add_norm(Tensor x, const Tensor& branch, const OptionalTensor& scale, const OptionalTensor& weight,
              const OptionalTensor& bias, std::string_view norm, double eps, Tensor normed) {
  using Signature = void(Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         std::string_view, double, Tensor&);
  static auto op = operation<Signature>("planecycle_fast_cpu::add_norm_");
  op.call(x, branch.contiguous(), scale, weight, bias, norm, eps, normed);
}

Tensor gated(
    const Tensor& gate,            // (rows, hidden), written to; (rows, 2*hidden) with its value
    const OptionalTensor& value) { // (rows, hidden)
  static auto within = operation<void(Tensor&, const Tensor&)>("planecycle_fast_cpu::swiglu_");
  static auto apart = operation<Tensor(const Tensor&, const OptionalTensor&)>("planecycle_fast_cpu::swiglu");
  if (!value) return apart.call(gate, value);
  auto out = gate;
  within.call(out, *value);
  return out;
}

// oneDNN's linear layer with what follows it in its epilogue: the bias, which F.linear in bfloat16 spends a pass over the
// output on, and the exact GELU.
Tensor onednn(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu) {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view, Scalars,
                           std::optional<std::string_view>);
  static auto op = operation<Signature>("mkldnn::_linear_pointwise");
  return op.call(x, weight, bias, gelu ? "gelu" : "none", Scalars(), gelu ? "none" : "");
}

// Into x the sum of the residual and attention; the MLP's branch is returned where there is one group, else in normed.
std::vector<Tensor> block_(
    Tensor x,       // (N, g + L, C), the residual
    Tensor normed,  // like x: its norm; written to
    at::TensorList qkv,              // one packed (3*heads*hd, C), or three (heads*hd, C)
    const OptionalTensors& qkv_bias, // like qkv, without C
    int64_t heads, std::optional<double> scale, int64_t num_globals, bool in_table_dtype,
    at::TensorList sin,  // per axis (n_i, s_i), see rope; none: nothing turns
    at::TensorList cos,  // like sin
    const Tensor& out, const OptionalTensor& out_bias,  // (C, heads*hd), (C,)
    const OptionalTensor& gamma,                        // (C,), of attention
    const OptionalTensor& weight, const OptionalTensor& bias, std::string_view norm, double eps,  // (C,) each, of norm2
    bool gate,                          // silu(a) * b instead of the exact GELU
    at::TensorList first,               // (hidden, C), one or two; one gated (2*hidden, C)
    const OptionalTensors& first_bias,  // like first, without C
    const Tensor& last, const OptionalTensor& last_bias,  // (C, hidden), (C,)
    int64_t sequences,                                    // of a group
    bool fused) {                                         // whether oneDNN takes these layers
  auto linear = [&](const Tensor& rows, const Tensor& w, const OptionalTensor& b) {
    auto helps = fused && b && rows.scalar_type() == at::kBFloat16 && w.is_contiguous();
    return helps ? onednn(rows, w, b, false) : at::linear(rows, w, b);
  };
  auto project = [&](const Tensor& rows) {  // q, k, v (n, heads, g + L, hd)
    std::vector<Tensor> parts, turned;
    for (size_t i = 0; i < qkv.size(); ++i)
      parts.push_back(linear(rows, qkv[i], qkv_bias.get(i)).unflatten(-1, {qkv.size() == 1 ? 3 * heads : heads, -1}));
    if (parts.size() == 1) {
      turned = {parts[0].narrow(2, 0, 2 * heads)};
      parts = parts[0].split(heads, 2);
    } else {
      turned = {parts[0], parts[1]};
    }
    for (const auto& t : turned)
      if (!sin.empty()) turn(t, num_globals, in_table_dtype, sin, cos);
    for (auto& part : parts) part = part.transpose(1, 2);
    return parts;
  };
  auto attend = [&](const Tensor& rows) {
    auto parts = project(rows);
    auto mixed = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0., false, scale);
    parts.clear();  // memory that the projection can have
    return linear(mixed.transpose(1, 2).flatten(2), out, out_bias);
  };
  auto activate = [&](const Tensor& rows) {
    if (!gate && fused && first[0].is_contiguous()) return onednn(rows, first[0], first_bias.get(0), true);
    auto hidden = linear(rows, first[0], first_bias.get(0));
    if (!gate) return at::gelu_(hidden);
    auto value = first.size() == 1 ? OptionalTensor() : linear(rows, first[1], first_bias.get(1)).flatten(0, 1);
    return gated(hidden.flatten(0, 1), value).unflatten(0, {rows.size(0), rows.size(1)});
  };
  auto count = x.size(0);
  for (int64_t start = 0; start < count; start += sequences) {
    auto size = std::min(sequences, count - start);
    auto rows = x.narrow(0, start, size), norms = normed.narrow(0, start, size);
    add_norm(rows, attend(norms), gamma, weight, bias, norm, eps, norms);  // norm1 is not needed any more
    auto branch = linear(activate(norms), last, last_bias);
    if (size == count) return {branch};
    norms.copy_(branch);
  }
  return {};
}

}  // namespace

TORCH_LIBRARY_IMPL(planecycle_fast_cpu, CompositeImplicitAutograd, m) { m.impl("block_", block_); }

}  // namespace pcf
