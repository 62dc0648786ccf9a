// The schemas of all operations: those of the Triton kernels, in a namespace of their own (tests hold both together).
#include <torch/library.h>

TORCH_LIBRARY(planecycle_fast_cpu, m) {
  m.def(
      "plane_switch(Tensor x, str old, str new, SymInt[] sizes, SymInt num_globals, SymInt via, bool mean, "
      "bool transposed) -> Tensor");
  m.def(
      "add_norm(Tensor x, Tensor? branch, Tensor? scale, Tensor? weight, Tensor? bias, str old, str new, SymInt[] sizes, "
      "SymInt num_globals, SymInt via, bool mean, str norm, float eps, ScalarType? dtype) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_norm_backward(Tensor? grad, Tensor? grad_normed, Tensor y, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? branch, Tensor? scale, str old, str new, SymInt[] sizes, SymInt num_globals, SymInt via, "
      "bool mean_pooled, str norm, bool[] wanted, ScalarType x_dtype, ScalarType? branch_dtype, ScalarType sums_dtype) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "rope(Tensor x, bool back, SymInt num_globals, SymInt turned, bool in_table_dtype, SymInt[] grid, Tensor[] sin, "
      "Tensor[] cos, Tensor[] periods, Tensor?[] augmentation, str normalize, bool inverse, bool promote, "
      "ScalarType coord_dtype, ScalarType table_dtype) -> Tensor");
  m.def(
      "rope_(Tensor(a0!) x, bool back, SymInt num_globals, SymInt turned, bool in_table_dtype, SymInt[] grid, "
      "Tensor[] sin, Tensor[] cos, Tensor[] periods, Tensor?[] augmentation, str normalize, bool inverse, bool promote, "
      "ScalarType coord_dtype, ScalarType table_dtype) -> ()");
  m.def("swiglu(Tensor gate, Tensor? value) -> Tensor");
  m.def("swiglu_(Tensor(a0!) gate, Tensor value) -> ()");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor? value) -> Tensor[]");
  // Of this backend alone, for inference: the sum in place, the norm into memory that is there; consecutive blocks.
  m.def(
      "add_norm_(Tensor(a0!) x, Tensor branch, Tensor? scale, Tensor? weight, Tensor? bias, str norm, float eps, "
      "Tensor(a1!) normed) -> ()");
  m.def(
      "blocks_(Tensor(a0!) x, Tensor(a1!) normed, Tensor?[] tensors, int num_qkv, int num_first, str[] norms, float[] eps, "
      "int heads, float? scale, bool in_table_dtype, bool gated, bool fused, str[] planes, int[] sizes, int num_globals, "
      "int[] vias, bool[] means, Tensor? weight, Tensor? bias, str last, float last_eps, Tensor[] sin, Tensor[] cos, "
      "int group_bytes, int most_groups) -> (Tensor, Tensor)");
}
