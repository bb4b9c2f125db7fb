// Native kernels of the operators that megatron_opt/kernels/dispatch.py defines: checks, then plain data to CPU or CUDA.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "cpu/multi_tensor.h"
#include "include/chunks.h"
#include "operators.h"
#ifdef MEGATRON_OPT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/block_adam.h"
#include "cuda/multi_tensor.h"
#include "cuda/symmetric.h"
#endif

namespace megatron_opt {
namespace {

using at::Tensor;
using Tensors = at::TensorList;

Format format_of(const Tensor& tensor, int slot, const char* list) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Format::f32;
    case at::kBFloat16:
      return Format::bf16;
    case at::kChar:
      if (slot == kState0 || slot == kState1) return Format::signed8;
      break;
    case at::kByte:
      if (slot == kState0 || slot == kState1) return Format::unsigned8;
      break;
    default:
      break;
  }
  TORCH_CHECK(false, list, " has a tensor of type ", tensor.scalar_type(), "; the native kernels take float32 and ",
              "bfloat16, and 8-bit states.");
}

struct List {
  std::vector<TensorEntry> entries;
  at::Device device{at::kCPU};

  explicit List(Tensors grads) : entries(grads.size()) {
    if (!grads.empty()) device = grads[0].device();
    for (size_t i = 0; i < grads.size(); ++i) {
      entries[i] = TensorEntry{};
      entries[i].numel = grads[i].numel();
    }
    add(kGrad, grads, "grads");
  }

  void add(int slot, Tensors tensors, const char* name) {
    if (tensors.empty()) return;
    TORCH_CHECK(tensors.size() == entries.size(), name, " has ", tensors.size(), " tensors, grads ", entries.size(), ".");
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& tensor = tensors[i];
      check(tensor, name, i, entries[i].numel);
      entries[i].data[slot] = tensor.data_ptr();
      entries[i].format[slot] = format_of(tensor, slot, name);
    }
  }

  void add_absmax(int slot, Tensors tensors, const char* name) {
    const bool needed = !entries.empty() && entries[0].format[slot] >= Format::signed8;
    TORCH_CHECK(!needed || tensors.size() == entries.size(), name, " has ", tensors.size(), " tensors, grads ",
                entries.size(), ".");
    for (size_t i = 0; i < tensors.size(); ++i) {
      check(tensors[i], name, i, blocks_of(entries[i].numel));
      TORCH_CHECK(tensors[i].scalar_type() == at::kFloat, name, "[", i, "] is not float32.");
      entries[i].absmax[slot] = tensors[i].mutable_data_ptr<float>();
    }
    for (const TensorEntry& entry : entries) {
      TORCH_CHECK(entry.format[slot] < Format::signed8 || entry.absmax[slot] != nullptr, name, " is missing.");
    }
  }

  void check(const Tensor& tensor, const char* name, size_t i, int64_t numel) const {
    TORCH_CHECK(tensor.device() == device, name, "[", i, "] is on ", tensor.device(), ", grads[0] on ", device, ".");
    TORCH_CHECK(tensor.is_contiguous(), name, "[", i, "] is not contiguous.");
    TORCH_CHECK(tensor.numel() == numel, name, "[", i, "] has ", tensor.numel(), " elements instead of ", numel, ".");
  }
};

void read_coefficients(at::ArrayRef<double> values, Options& options) {
  TORCH_CHECK(values.size() == kCoefficients, "got ", values.size(), " coefficients instead of ", kCoefficients, ".");
  float* to = reinterpret_cast<float*>(&options.coefficients);
  for (int i = 0; i < kCoefficients; ++i) to[i] = static_cast<float>(values[i]);
}

// Tensors that each rule needs, by UpdateKind: states, and whether it writes an output instead of parameters.
constexpr int kUpdateStates[] = {2, 3, 2, 1, 1, 2, 1, 0};
constexpr bool kUpdateOutput[] = {false, false, false, false, false, false, true, false};

Tensor update(int64_t kind, Tensors params, Tensors grads, Tensors state0, Tensors state1, Tensors state2,
              Tensors copies, Tensors absmax0, Tensors absmax1, const std::optional<Tensor>& scales,
              at::ArrayRef<double> coefficients, const std::optional<Tensor>& device_coefficients, bool cautious_decay,
              bool stochastic, int64_t seed, int64_t step, at::IntArrayRef element_offsets, bool with_sums) {
  TORCH_CHECK(kind >= 0 && kind < 8, "there is no rule ", kind, ".");
  const size_t count = grads.size();
  const Tensors states[] = {state0, state1, state2};
  for (int k = 0; k < 3; ++k) {
    TORCH_CHECK(states[k].size() == (k < kUpdateStates[kind] ? count : 0), "state", k, " has ", states[k].size(),
                " tensors, grads ", count, "; the rule has ", kUpdateStates[kind], " states.");
  }
  TORCH_CHECK(params.size() == (kUpdateOutput[kind] ? 0 : count), "params has ", params.size(), " tensors, grads ", count, ".");
  TORCH_CHECK(!kUpdateOutput[kind] || copies.size() == count, "outputs has ", copies.size(), " tensors, grads ", count, ".");
  List list(grads);
  list.add(kParam, params, "params");
  for (int k = 0; k < 3; ++k) list.add(kState0 + k, states[k], "states");
  list.add(kCopy, copies, kUpdateOutput[kind] ? "outputs" : "copies");
  list.add_absmax(kState0, absmax0, "absmax0");
  list.add_absmax(kState1, absmax1, "absmax1");
  for (const TensorEntry& entry : list.entries) {
    TORCH_CHECK(kUpdateOutput[kind] || entry.format[kCopy] == Format::absent || entry.format[kCopy] == Format::bf16,
                "copies must be bfloat16.");
  }
  TORCH_CHECK(element_offsets.empty() || element_offsets.size() == count, "element_offsets has ", element_offsets.size(), " numbers, grads ", count, ".");
  uint64_t first = 0;
  for (size_t i = 0; i < count; ++i) {
    list.entries[i].first = element_offsets.empty() ? first : static_cast<uint64_t>(element_offsets[i]);
    first += static_cast<uint64_t>(list.entries[i].numel);
  }
  Options options{};
  read_coefficients(coefficients, options);
  options.cautious_decay = cautious_decay;
  options.stochastic = stochastic;
  options.seed = static_cast<uint64_t>(seed);
  options.step = static_cast<uint32_t>(step);
  if (scales.has_value()) {
    list.check(*scales, "scales", 0, 2 * static_cast<int64_t>(count));
    TORCH_CHECK(scales->scalar_type() == at::kFloat, "scales is not float32.");
    options.scales = scales->const_data_ptr<float>();
  }
  if (device_coefficients.has_value()) {
    list.check(*device_coefficients, "device_coefficients", 0, kCoefficients);
    TORCH_CHECK(device_coefficients->scalar_type() == at::kFloat, "device_coefficients is not float32.");
    options.device_coefficients = device_coefficients->const_data_ptr<float>();
  }
  const int64_t rows = with_sums ? static_cast<int64_t>(count) : 0;
  Tensor sums = at::empty({rows, 3}, at::TensorOptions().dtype(at::kDouble).device(list.device));
  if (with_sums) options.sums = sums.mutable_data_ptr<double>();
#ifdef MEGATRON_OPT_WITH_CUDA
  if (list.device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(list.device);
    const Tensor workspace = at::empty({with_sums ? workspace_cuda(list.entries) : 0}, sums.options());
    update_cuda(static_cast<UpdateKind>(kind), options, list.entries, with_sums ? workspace.mutable_data_ptr<double>() : nullptr,
                c10::cuda::getCurrentCUDAStream());
    return sums;
  }
#endif
  if (options.device_coefficients != nullptr) {
    std::memcpy(&options.coefficients, options.device_coefficients, sizeof(Coefficients));
  }
  update_cpu(static_cast<UpdateKind>(kind), options, list.entries, at::get_num_threads());
  return sums;
}

Tensor sum(int64_t kind, Tensors params, Tensors grads, Tensors state0, Tensors absmax0,
           at::ArrayRef<double> coefficients) {
  TORCH_CHECK(kind >= 0 && kind < 4, "there is no sum ", kind, ".");
  List list(grads);
  const bool with_state = kind == static_cast<int>(Sum::cautious_mask) || kind == static_cast<int>(Sum::mars_norm);
  TORCH_CHECK(state0.size() == (with_state ? grads.size() : 0), "state0 has ", state0.size(), " tensors.");
  TORCH_CHECK(params.size() == (kind == static_cast<int>(Sum::products) ? grads.size() : 0), "params has ",
              params.size(), " tensors.");
  list.add(kParam, params, "params");
  list.add(kState0, state0, "states");
  list.add_absmax(kState0, absmax0, "absmax0");
  Options options{};
  read_coefficients(coefficients, options);
  Tensor sums = at::empty({static_cast<int64_t>(grads.size()), 3},
                          at::TensorOptions().dtype(at::kDouble).device(list.device));
#ifdef MEGATRON_OPT_WITH_CUDA
  if (list.device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(list.device);
    const Tensor workspace = at::empty({workspace_cuda(list.entries)}, sums.options());
    sum_cuda(static_cast<Sum>(kind), options, list.entries, workspace.mutable_data_ptr<double>(),
             sums.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
    return sums;
  }
#endif
  sum_cpu(static_cast<Sum>(kind), options, list.entries, sums.mutable_data_ptr<double>(), at::get_num_threads());
  return sums;
}

// Directions of Adam-mini: m like g, v with one number for each of its equal blocks.
void block_adam(Tensors grads, Tensors moments, Tensors seconds, Tensors directions, at::ArrayRef<double> coefficients) {
  TORCH_CHECK(moments.size() == grads.size() && seconds.size() == grads.size() && directions.size() == grads.size(),
              "moments has ", moments.size(), " tensors, seconds ", seconds.size(), ", directions ", directions.size(),
              ", grads ", grads.size(), ".");
  Options options{};
  read_coefficients(coefficients, options);
  std::vector<BlockEntry> entries;
  const List list(grads);
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t numel = grads[i].numel(), blocks = seconds[i].numel();
    list.check(moments[i], "moments", i, numel);
    list.check(seconds[i], "seconds", i, blocks);
    list.check(directions[i], "directions", i, numel);
    for (const Tensor* tensor : {&grads[i], &moments[i], &seconds[i], &directions[i]}) {
      TORCH_CHECK(tensor->scalar_type() == at::kFloat, "grads, moments, seconds and directions must be float32.");
    }
    TORCH_CHECK(blocks > 0 ? numel % blocks == 0 : numel == 0, "seconds[", i, "] has ", blocks,
                " elements, which do not divide grads[", i, "] of ", numel, ".");
    entries.push_back({grads[i].const_data_ptr<float>(), moments[i].mutable_data_ptr<float>(),
                      seconds[i].mutable_data_ptr<float>(), directions[i].mutable_data_ptr<float>(), numel, blocks});
  }
#ifdef MEGATRON_OPT_WITH_CUDA
  if (list.device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(list.device);
    block_adam_cuda(options.coefficients, entries, c10::cuda::getCurrentCUDAStream());
    return;
  }
#endif
  block_adam_cpu(options.coefficients, entries, at::get_num_threads());
}

#ifdef MEGATRON_OPT_WITH_CUDA
// alpha·a·aᵀ + beta·d for bf16 (B, n, k) and symmetric d (B, n, n).
Tensor symmetric_product(const Tensor& a, const std::optional<Tensor>& d, double alpha, double beta) {
  TORCH_CHECK(a.dim() == 3 && a.is_contiguous() && a.scalar_type() == at::kBFloat16,
              "a must be contiguous, bfloat16 and of three dimensions.");
  const int64_t batch = a.size(0), n = a.size(1), k = a.size(2);
  TORCH_CHECK(!d.has_value() || (d->sizes() == at::IntArrayRef({batch, n, n}) && d->is_contiguous() &&
                                 d->scalar_type() == at::kBFloat16 && d->device() == a.device()),
              "d must be contiguous, bfloat16 and of shape (", batch, ", ", n, ", ", n, ").");
  const c10::cuda::CUDAGuard guard(a.device());
  Tensor out = at::empty({batch, n, n}, a.options());
  symmetric_cuda({a.const_data_ptr(), d ? d->const_data_ptr() : nullptr, out.mutable_data_ptr(), n, k,
                  static_cast<float>(alpha), static_cast<float>(beta)},
                 batch, c10::cuda::getCurrentCUDAStream());
  return out;
}
#endif

}  // namespace

// Called once the Python side has checked that this build is the right one: an import alone changes nothing.
void register_operators() {
  static torch::Library cpu(torch::Library::IMPL, "megatron_opt", c10::DispatchKey::CPU, __FILE__, __LINE__);
  cpu.impl("multi_tensor_update", update);
  cpu.impl("multi_tensor_sum", sum);
  cpu.impl("block_adam", block_adam);
#ifdef MEGATRON_OPT_WITH_CUDA
  static torch::Library cuda(torch::Library::IMPL, "megatron_opt", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  cuda.impl("multi_tensor_update", update);
  cuda.impl("multi_tensor_sum", sum);
  cuda.impl("block_adam", block_adam);
  cuda.impl("symmetric_product", symmetric_product);
#endif
}

}  // namespace megatron_opt
