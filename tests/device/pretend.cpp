// A pretend accelerator for PyTorch: device type "pretend" (PrivateUse1), memory on the host, kernels of the CPU.
//
// Every operation that has a CPU kernel runs it on host aliases of the device tensors, with no copy: results are
// bit for bit those of the CPU. What CUDA refuses is refused (tensors on two devices, a generator of the other
// device), and what costs time on CUDA is counted and reported to a listener (host syncs, copies, float64, launches).
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/copy_native.h>
#include <torch/library.h>

#include <set>

#include "parts.h"

namespace {

// ---- one operation on host aliases ------------------------------------------------------------------------------

struct Aliases {
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;         // on the device, on the host
  std::vector<std::pair<c10::Storage, c10::Storage>> storages;    // likewise

  c10::Storage host(const c10::Storage& here) {
    if (here.device_type() != kHere) return here;
    for (auto& [device, alias] : storages)
      if (device.is_alias_of(here)) return alias;
    c10::Storage alias(
        c10::Storage::use_byte_size_t(), here.nbytes(), lent(here, c10::kCPU), c10::GetCPUAllocator(), true);
    storages.emplace_back(here, alias);
    return alias;
  }

  c10::Storage device(const c10::Storage& there) {
    for (auto& [device, alias] : storages)
      if (alias.is_alias_of(there)) return device;
    c10::Storage here(c10::Storage::use_byte_size_t(), there.nbytes(), lent(there, HERE), &memory, true);
    storages.emplace_back(here, there);
    return here;
  }

  static at::Tensor shaped(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(key), like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
    return made;
  }

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
    TORCH_CHECK(!tensor.is_conj() && !tensor.is_neg(), "pretend: lazy conjugates are not supported");
    for (auto& [device, alias] : tensors)
      if (device.is_same(tensor)) return alias;
    tensors.emplace_back(tensor, shaped(host(tensor.storage()), c10::DispatchKey::CPU, tensor));
    return tensors.back().second;
  }

  at::Tensor device(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& [device, alias] : tensors)
      if (alias.is_same(tensor)) return device;
    return shaped(device(tensor.storage()), c10::DispatchKey::PrivateUse1, tensor);
  }

  void settle() {  // what resize_, set_ and out= changed of shapes and memory
    for (auto& [device, alias] : storages) {
      auto *here = device.unsafeGetStorageImpl(), *there = alias.unsafeGetStorageImpl();
      if (here->data() == there->data() && here->nbytes() == there->nbytes()) continue;
      here->set_data_ptr_noswap(lent(alias, HERE));
      here->set_nbytes(there->nbytes());
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      auto [here, there] = tensors[i];
      auto* impl = here.unsafeGetTensorImpl();
      if (!host(here.storage()).is_alias_of(there.storage())) impl->set_storage_keep_dtype(device(there.storage()));
      if (here.sizes() != there.sizes() || here.strides() != there.strides() ||
          here.storage_offset() != there.storage_offset())
        impl->set_sizes_and_strides(there.sizes(), there.strides(), there.storage_offset());
    }
  }
};

const std::set<std::string> QUIET = {  // no kernel on any device
    "aten::empty", "aten::empty_strided", "aten::resize_", "aten::set_", "aten::_reshape_alias", "aten::view",
    "aten::_local_scalar_dense", "aten::is_set_to", "aten::_has_compatible_shallow_copy_type", "aten::as_strided"};
const std::set<std::string> WAITING = {  // on CUDA the host waits for a size, a flag or an error code
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::equal", "aten::bincount",
    "aten::repeat_interleave", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_eig", "aten::linalg_lstsq",
    "aten::_linalg_eigvals", "aten::histc", "aten::linalg_eigvals", "aten::ormqr"};
const std::set<std::string> INDEXING = {  // the operations whose indices may lie on the host
    "aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::_unsafe_index_put"};
const std::set<std::string> STRICT = {  // not even a host tensor without dimensions is taken
    "aten::cat", "aten::stack", "aten::dot", "aten::vdot", "aten::mm", "aten::mv", "aten::bmm", "aten::addmm",
    "aten::addmv", "aten::baddbmm", "aten::gather", "aten::scatter", "aten::scatter_add", "aten::index_select",
    "aten::index_add", "aten::index_copy", "aten::embedding", "aten::nll_loss_forward", "aten::nll_loss_backward"};

const std::set<std::string> DRAWING = {  // operations that draw without a generator in their signature
    "aten::native_dropout", "aten::rrelu_with_noise", "aten::rrelu_with_noise_"};

struct SwappedRandom {  // the CPU's default generator stands in for the device's, and is put back
  bool active;
  c10::GeneratorImpl* host = at::detail::getDefaultCPUGenerator().unsafeGetGeneratorImpl();
  c10::intrusive_ptr<c10::TensorImpl> before;
  explicit SwappedRandom(bool wanted) : active(wanted) {
    if (!active) return;
    before = host->get_state();
    host->set_state(*ours().unsafeGetGeneratorImpl()->get_state());
  }
  ~SwappedRandom() {
    if (!active) return;
    ours().unsafeGetGeneratorImpl()->set_state(*host->get_state());
    host->set_state(*before);
  }
};

bool takes_generator(const c10::Argument& argument) {
  auto* optional = argument.type()->castRaw<c10::OptionalType>();
  return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const bool indexing = INDEXING.count(name);
  Aliases aliases;
  int64_t widest = 0, carried = 0;
  bool masked = false;
  std::vector<std::pair<at::Tensor, bool>> strangers;  // tensors on the host, and whether the operation writes them

  auto turn = [&](const at::Tensor& tensor, bool written) {
    if (tensor.defined() && !tensor.is_privateuseone()) strangers.emplace_back(tensor, written);
    if (tensor.defined() && tensor.scalar_type() == at::kDouble) widest = std::max<int64_t>(widest, tensor.numel());
    return aliases.host(tensor);
  };
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    auto& value = (*stack)[first + i];
    const auto& argument = schema.arguments()[i];
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      value = turn(value.toTensor(), written);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(turn(tensor, written));
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        if (indexing && tensor && tensor->defined()) {
          masked |= tensor->scalar_type() == at::kBool || tensor->scalar_type() == at::kByte;
          if (!tensor->is_privateuseone()) carried += tensor->nbytes();
          list.push_back(aliases.host(*tensor));
        } else {
          list.push_back(tensor ? std::optional<at::Tensor>(turn(*tensor, written)) : std::nullopt);
        }
      }
      value = std::move(list);
    } else if (value.isStorage()) {
      value = aliases.host(value.toStorage());
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator() || (value.isNone() && takes_generator(argument))) {
      auto given = value.isNone() ? ours() : value.toGenerator();
      TORCH_CHECK(given.device().type() == kHere, "Expected a 'pretend' device type for generator but found '",
          given.device(), "' (", name, ")");
      value = static_cast<Random*>(given.unsafeGetGeneratorImpl())->inner;
    }
  }
  if (!aliases.tensors.empty() && name != "aten::set_")
    for (auto& [tensor, written] : strangers)
      TORCH_CHECK(tensor.dim() == 0 && !written && !STRICT.count(name),
          "Expected all tensors to be on the same device, but found at least two devices, pretend:0 and ",
          tensor.device(), " (a tensor of shape ", tensor.sizes(), " in ", name, ")");

  const bool view = !schema.returns().empty() && schema.returns()[0].alias_info() &&
      !schema.returns()[0].alias_info()->isWrite();
  {
    at::AutoDispatchBelowADInplaceOrView below;
    SwappedRandom swapped(DRAWING.count(name));
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  aliases.settle();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    auto back = [&](const at::Tensor& tensor) {
      if (tensor.defined() && tensor.scalar_type() == at::kDouble) widest = std::max<int64_t>(widest, tensor.numel());
      return aliases.device(tensor);
    };
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(back(tensor));
      value = std::move(list);
    }
  }
  if (name == "aten::_local_scalar_dense") count("item", name, 0);
  if (carried) count("h2d", name, carried);
  if (masked || WAITING.count(name)) count("implicit", masked ? name + " with a mask" : name, 0);
  if (view || QUIET.count(name)) return;
  count("launch", name, 0, false);
  if (widest) count("float64", name, widest, false);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  Aliases aliases;
  auto to = aliases.host(dst);
  at::AutoDispatchBelowADInplaceOrView below;
  at::native::copy_(to, aliases.host(self), non_blocking);
  const char* late = non_blocking ? "non_blocking" : "blocking";
  // what goes to the device is cast before it goes, what comes from it afterwards
  const int64_t bytes = self.numel() * (self.is_cpu() ? dst : self).element_size();
  if (self.device() == dst.device()) {
    count("launch", "aten::_copy_from", 0, false);
    if (self.scalar_type() == at::kDouble || dst.scalar_type() == at::kDouble)
      count("float64 cast", "aten::_copy_from", self.numel(), false);
  } else {
    count(self.is_cpu() ? "h2d" : "d2h", late, bytes);
  }
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  if (self.sizes() != dst.sizes()) dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}

struct Nothing final : c10::Allocator {  // for tensors of zeros that are never written out (forward-mode derivatives)
  c10::DataPtr allocate(size_t) override { return {nullptr, nullptr, &c10::detail::deleteNothing, HERE}; }
  void copy_data(void*, const void*, size_t) const override {}
} nothing;

at::Tensor zeros_unwritten(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>) {
  constexpr auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1) | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor);
  return at::detail::empty_generic(size, &nothing, keys, c10::dtype_or_default(dtype), std::nullopt);
}

int64_t sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
    double, bool, std::optional<double>, bool) {
  const auto& context = at::globalContext();
  if (context.userEnabledFlashSDP() || context.userEnabledMemEfficientSDP())
    count("fused attention", "CUDA may take a kernel without second derivatives", 0);
  return 0;  // MATH
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }  // casts nothing

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_fused_sdp_choice", sdp_choice);
  m.impl("_efficientzerotensor", zeros_unwritten);
  const std::set<std::string> made = {"aten::_copy_from", "aten::_copy_from_and_resize", "aten::_fused_sdp_choice",
      "aten::_efficientzerotensor"};
  std::set<std::pair<std::string, std::string>> names = {{"aten::convolution", ""}, {"aten::convolution_backward", ""}};
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& op : dispatcher.getRegistrationsForDispatchKey(c10::DispatchKey::CPU))
    names.emplace(op.name, op.overload_name);  // else their composite kernels run, in more launches than on CUDA
  for (const auto& op : dispatcher.getAllOpNames())
    if (op.name.rfind("aten::_foreach_", 0) == 0) names.emplace(op.name, op.overload_name);
  for (const auto& [name, overload] : names)
    if (name.rfind("aten::", 0) == 0 && !made.count(name))
      m.impl((overload.empty() ? name : name + "." + overload).c_str(),
          torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

}  // namespace

extern "C" {

void pretend_start() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }

void pretend_listen(Listener to, int launches) {
  listener = to;
  told = launches != 0;
}

void pretend_reset() {
  std::lock_guard<std::mutex> lock(guarded);
  counted.clear();
}

const char* pretend_counts() {  // lines of kind, name, times, amount
  static std::string text;
  std::lock_guard<std::mutex> lock(guarded);
  text.clear();
  for (const auto& [key, entry] : counted)
    text += key.first + "\t" + key.second + "\t" + std::to_string(entry.first) + "\t" + std::to_string(entry.second) + "\n";
  return text.c_str();
}

int64_t pretend_memory(int64_t most) {  // the limit from here on, if it is not negative; the peak since then
  const int64_t found = peak;
  if (most >= 0) {
    limit = most ? most : INT64_MAX;
    peak = used.load();
  }
  return found;
}

int64_t pretend_used() { return used; }

int64_t pretend_limit() { return limit; }

void pretend_seed(uint64_t seed) { ours().set_current_seed(seed); }

int64_t pretend_random(char* bytes, int64_t size, int set) {  // the default generator's state out or in; its size
  auto state = ours().get_state();
  const int64_t needed = state.numel();
  if (bytes && size == needed) {
    if (set) {
      auto fresh = state.clone();
      std::memcpy(fresh.mutable_data_ptr(), bytes, size);
      ours().set_state(fresh);
    } else {
      std::memcpy(bytes, state.const_data_ptr(), size);
    }
  }
  return needed;
}
}
