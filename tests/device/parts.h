// What the pretend accelerator is made of, its operations aside: counters, memory, a stream of random numbers.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr auto kHere = c10::DeviceType::PrivateUse1;
const c10::Device HERE(kHere, 0);

// ---- counters -------------------------------------------------------------------------------------------------

using Listener = void (*)(const char* kind, const char* name, int64_t amount);
std::mutex guarded;
std::map<std::pair<std::string, std::string>, std::pair<int64_t, int64_t>> counted;  // (kind, name) -> times, amount
Listener listener = nullptr;
bool told = false;  // every launch to the listener too, not only what syncs or copies

void count(const char* kind, const std::string& name, int64_t amount, bool tell = true) {
  {
    std::lock_guard<std::mutex> lock(guarded);
    auto& entry = counted[{kind, name}];
    entry.first += 1;
    entry.second += amount;
  }
  if (listener && (tell || told)) listener(kind, name.c_str(), amount);
}

// ---- memory: host memory that calls itself device memory, with a limit ------------------------------------------

std::atomic<int64_t> used{0}, peak{0}, limit{INT64_MAX};

struct Kept {  // what a piece of device memory keeps alive, as long as it is counted
  c10::DataPtr memory;
  c10::Storage owner;
  int64_t bytes;
  Kept(c10::DataPtr memory, c10::Storage owner, int64_t bytes)
      : memory(std::move(memory)), owner(std::move(owner)), bytes(bytes) {
    TORCH_CHECK_WITH(OutOfMemoryError, used + bytes <= limit, "pretend out of memory. Tried to allocate ", bytes,
        " bytes; ", used.load(), " of ", limit.load(), " are in use");
    used += bytes;
    peak = std::max(peak.load(), used.load());
  }
  ~Kept() { used -= bytes; }
  static void drop(void* kept) { delete static_cast<Kept*>(kept); }
};

c10::DataPtr lent(const c10::Storage& owner, c10::Device as) {
  const int64_t bytes = as == HERE ? owner.nbytes() : 0;
  return {owner.mutable_data(), new Kept({}, owner, bytes), &Kept::drop, as};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto held = c10::GetCPUAllocator()->allocate(bytes);
    void* data = held.get();
    return {data, new Kept(std::move(held), {}, bytes), &Kept::drop, HERE};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(kHere, &memory)

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kHere> {  // streams and events: there is one, in order
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeDevice(const c10::DeviceIndex) const override { count("synchronize", "device", 0); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- random numbers: a generator of the device's own, which no CPU operation takes ------------------------------

struct Random final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  Random() : GeneratorImpl(HERE, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Random* clone_impl() const override {
    auto* other = new Random();
    other->inner = inner.clone();
    return other;
  }
};

at::Generator& ours() {
  static auto generator = at::make_generator<Random>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  at::Device getDeviceFromPtr(void*) const override { return HERE; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return ours(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Random>(); }
};

}  // namespace
