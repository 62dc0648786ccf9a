// blocks_: consecutive blocks for inference, from the first one's norm1 to the last one's MLP. Attention and MLP go group by
// group of sequences, so that what passes between layers stays in the caches; all in one operation, so that it costs Python
// nothing. Made of other operations alone. See groups.py.
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

struct Linear {
  Tensor weight;        // (out, in)
  OptionalTensor bias;  // (out,)
};

struct Norm {
  OptionalTensor weight, bias;  // (C,) each
  std::string kind;
  double eps;
};

// What is the same in all blocks.
struct Settings {
  int64_t heads;
  std::optional<double> scale;  // of scores
  int64_t num_globals;
  bool in_table_dtype, gated, fused;  // see rope; silu(a) * b instead of the exact GELU; whether oneDNN takes these layers
};

struct Block {
  std::vector<Linear> qkv;    // one packed (3*heads*hd, C), or three (heads*hd, C)
  Linear out;                 // (C, heads*hd)
  std::vector<Linear> first;  // (hidden, C), one or two; one gated (2*hidden, C)
  Linear last;                // (C, hidden)
  Norm norm1, norm2;
  OptionalTensor gamma1, gamma2;  // (C,), of attention and MLP
};

// Block i of flat lists. Its tensors: qkv, out, first, last (weight and bias each), norm1, gamma1, norm2, gamma2.
Block block_of(const OptionalTensors& tensors, int64_t i, int64_t num_qkv, int64_t num_first, const c10::List<std::string>& norms,
               at::ArrayRef<double> eps) {
  auto next = i * (10 + 2 * (num_qkv + num_first));
  auto optional = [&] { return tensors.get(next++); };
  auto norm = [&](int64_t k) { auto weight = optional(); return Norm{weight, optional(), norms.get(k), eps[k]}; };
  auto linear = [&] { auto weight = optional().value(); return Linear{weight, optional()}; };
  auto linears = [&](int64_t n) {
    std::vector<Linear> found;
    while (n--) found.push_back(linear());
    return found;
  };
  Block block;
  block.qkv = linears(num_qkv), block.out = linear(), block.first = linears(num_first), block.last = linear();
  block.norm1 = norm(0), block.gamma1 = optional(), block.norm2 = norm(1), block.gamma2 = optional();
  return block;
}

void turn(
    Tensor x,             // (n, g + L, heads, hd), written to
    const Settings& settings,
    const Tensor& sin,    // (L, hd/2)
    const Tensor& cos) {  // like sin
  using Signature = void(Tensor&, bool, c10::SymInt, c10::SymInt, bool, c10::SymIntArrayRef, at::TensorList, at::TensorList,
                         at::TensorList, const OptionalTensors&, std::string_view, bool, bool, at::ScalarType, at::ScalarType);
  static auto rope = operation<Signature>("planecycle_fast_cpu::rope_");
  auto dtype = sin.scalar_type();
  rope.call(x, false, settings.num_globals, x.sym_size(2), settings.in_table_dtype, {sin.sym_size(0)}, sin, cos, {},
            OptionalTensors(), "", false, false, dtype, dtype);
}

void add_norm(
    Tensor x,                     // (n, g + L, C); becomes the sum
    const Tensor& branch,         // like x
    const OptionalTensor& scale,  // (C,)
    const Norm& norm,
    Tensor normed) {  // like x; becomes its norm
  using Signature = void(Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         std::string_view, double, Tensor&);
  static auto op = operation<Signature>("planecycle_fast_cpu::add_norm_");
  op.call(x, branch.contiguous(), scale, norm.weight, norm.bias, norm.kind, norm.eps, normed);
}

// A change of planes, or where rows stay in place that of a volume N deep.
struct Change {
  std::string old, next;
  std::array<c10::SymInt, 3> sizes;
  int64_t num_globals, via;
  bool mean;

  std::tuple<Tensor, Tensor> operator()(  // -> the sum and its norm, (B*P2, g + L2, C) each
      const Tensor& x,                    // (B*P1, g + L1, C)
      const Tensor& branch,               // like x
      const OptionalTensor& scale,        // (C,)
      const Norm& norm) const {
    using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::string_view,
        std::string_view, c10::SymIntArrayRef, c10::SymInt, c10::SymInt, bool, std::string_view, double, std::optional<at::ScalarType>);
    static auto op = operation<Signature>("planecycle_fast_cpu::add_norm");
    auto made = op.call(x, branch.contiguous(), scale, norm.weight, norm.bias, old, next, sizes, num_globals, via, mean, norm.kind,
                        norm.eps, std::nullopt);
    return {std::get<0>(made), std::get<1>(made)};
  }
};

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
Tensor onednn(
    const Tensor& x,  // (n, rows, in)
    const Linear& layer, bool gelu) {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view, Scalars,
                           std::optional<std::string_view>);
  static auto op = operation<Signature>("mkldnn::_linear_pointwise");
  return op.call(x, layer.weight, layer.bias, gelu ? "gelu" : "none", Scalars(), gelu ? "none" : "");
}

Tensor linear(
    const Tensor& x,  // (n, rows, in)
    const Linear& layer, bool fused) {
  auto helps = fused && layer.bias && x.scalar_type() == at::kBFloat16 && layer.weight.is_contiguous();
  return helps ? onednn(x, layer, false) : at::linear(x, layer.weight, layer.bias);
}

// The branch of attention, without LayerScale.
Tensor attend(
    const Tensor& normed,  // (n, g + L, C)
    const Block& block, const Settings& settings,
    const OptionalTensor& sin,    // (L, hd/2); none: nothing turns
    const OptionalTensor& cos) {  // like sin
  auto heads = settings.heads;
  auto packed = block.qkv.size() == 1;
  std::vector<Tensor> parts, turned;  // (n, g + L, heads, hd)
  for (const auto& layer : block.qkv)
    parts.push_back(linear(normed, layer, settings.fused).unflatten(-1, {packed ? 3 * heads : heads, -1}));
  if (packed) {
    turned = {parts[0].narrow(2, 0, 2 * heads)};
    parts = parts[0].split(heads, 2);
  } else {
    turned = {parts[0], parts[1]};
  }
  for (const auto& t : turned)
    if (sin) turn(t, settings, *sin, *cos);
  turned.clear();
  for (auto& part : parts) part = part.transpose(1, 2);
  auto mixed = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0., false, settings.scale);
  parts.clear();  // memory that the projection can have
  return linear(mixed.transpose(1, 2).flatten(2), block.out, settings.fused);
}

// The MLP up to its activation.
Tensor activate(
    const Tensor& normed,  // (n, g + L, C)
    const Block& block, const Settings& settings) {
  const auto& first = block.first;
  if (!settings.gated && settings.fused && first[0].weight.is_contiguous()) return onednn(normed, first[0], true);
  auto hidden = linear(normed, first[0], settings.fused);
  if (!settings.gated) return at::gelu_(hidden);
  auto value = first.size() == 1 ? OptionalTensor() : linear(normed, first[1], settings.fused).flatten(0, 1);
  return gated(hidden.flatten(0, 1), value).unflatten(0, {normed.size(0), normed.size(1)});
}

// Into x the sum of the residual and attention; returns the MLP's branch.
Tensor run(
    const Tensor& x,       // (N, g + L, C), the residual
    const Tensor& normed,  // like x: its norm; written to
    const Block& block, const Settings& settings,
    const OptionalTensor& sin,  // (L, hd/2)
    const OptionalTensor& cos,  // like sin
    int64_t group_bytes,        // of the widest activations of a group
    int64_t most_groups) {      // that run, 0: all; a plan of memory needs the first one
  auto count = x.size(0);
  auto bytes = x.size(1) * block.first[0].weight.size(0) * static_cast<int64_t>(x.element_size());
  auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  auto sequences = ceil(count, ceil(count, std::max<int64_t>(1, group_bytes / bytes)));  // groups of equal size
  auto end = most_groups ? std::min(count, most_groups * sequences) : count;
  for (int64_t start = 0; start < end; start += sequences) {
    auto size = std::min(sequences, count - start);
    auto rows = x.narrow(0, start, size), norms = normed.narrow(0, start, size);
    add_norm(rows, attend(norms, block, settings, sin, cos), block.gamma1, block.norm2, norms);  // norm1 is not needed any more
    auto branch = linear(activate(norms, block, settings), block.last, settings.fused);
    if (size == count) return branch;
    norms.copy_(branch);
  }
  return normed;
}

// The tensor, which leaves an empty one behind: arguments live as long as the call.
Tensor take(
    Tensor& t) {  // any shape
  auto taken = t.detach();
  t.set_();
  return taken;
}

// -> (B*P, g + L, C) each: the residual and the last MLP's branch; with a last norm their sum and its norm
std::tuple<Tensor, Tensor> blocks_(
    Tensor x_,       // (B*P, g + L, C), the residual in the order of the first block's plane; taken
    Tensor normed_,  // like x: norm1 of the first block; taken
    const OptionalTensors& tensors, int64_t num_qkv, int64_t num_first,                // see block_of
    const c10::List<std::string>& norms, at::ArrayRef<double> eps,                     // of norm1 and norm2
    int64_t heads, std::optional<double> scale, bool in_table_dtype, bool is_gated, bool fused,  // see Settings
    const c10::List<std::string>& planes,  // of each block, and that of the last norm
    at::IntArrayRef sizes, int64_t num_globals,
    at::IntArrayRef vias,          // of each change of planes; 0: rows stay where they are, and globals are rows like others
    const c10::List<bool>& means,  // like vias
    const OptionalTensor& weight, const OptionalTensor& bias,  // (C,) each, of the last norm
    std::string_view last, double last_eps,                    // "none": there is no last norm
    at::TensorList sin,  // of each block (L, hd/2), see rope; none: nothing turns
    at::TensorList cos,  // like sin
    int64_t group_bytes, int64_t most_groups) {
  Settings settings{heads, scale, num_globals, in_table_dtype, is_gated, fused};
  auto x = take(x_), normed = take(normed_);
  Tensor branch;
  OptionalTensor gamma;
  auto change = [&](size_t i, const Norm& norm) {  // to plane i
    Change to{planes.get(i - 1), planes.get(i), {sizes[0], sizes[1], sizes[2]}, num_globals, vias[i - 1], means.get(i - 1)};
    if (!to.via) to = {"HW", "HW", {x.size(0), 1, x.size(1)}, 0, 1, false};
    normed = Tensor();
    std::tie(x, normed) = to(x, branch, gamma, norm);
    branch = Tensor();
  };
  auto count = planes.size() - (last == "none" ? 0 : 1);
  for (size_t i = 0; i < count; ++i) {
    auto block = block_of(tensors, i, num_qkv, num_first, norms, eps);
    if (i) change(i, block.norm1);
    auto angles = [&](at::TensorList tables) { return tables.empty() ? OptionalTensor() : tables[i]; };
    branch = run(x, normed, block, settings, angles(sin), angles(cos), group_bytes, most_groups);
    gamma = block.gamma2;
  }
  if (last == "none") return {x, branch};
  change(count, Norm{weight, bias, std::string(last), last_eps});
  return {x, normed};
}

}  // namespace

TORCH_LIBRARY_IMPL(planecycle_fast_cpu, CompositeImplicitAutograd, m) { m.impl("blocks_", blocks_); }

}  // namespace pcf
