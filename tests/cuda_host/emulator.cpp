// Runs a kernel's threads as fibers: one block at a time, its threads in turn, from one wait to the next.
//
// What is checked, by an exception that names file and line: a barrier that some threads of the block do not reach, or
// reach elsewhere, or have left the kernel before; the same for lanes of a warp; launches beyond the limits; dynamic
// shared memory written beyond either end. Shared memory starts as NaN in every block. Blocks run in no monotone order,
// and threads upwards in one block, downwards in the next, so that what depends on an order shows.
#include "cuda_runtime.h"

#include <csetjmp>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <sys/mman.h>
#include <ucontext.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern unsigned char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xa5, kNaN = 0xff;  // bytes ff are a NaN in every floating format

struct Where {
  const char *what = "", *file = "";
  int line = 0;
  bool operator==(const Where& o) const { return line == o.line && !std::strcmp(file, o.file) && !std::strcmp(what, o.what); }
  std::string text() const { return std::string(what) + " at " + file + ":" + std::to_string(line); }
};

struct Copy { void* to; const void* from; size_t bytes, zeros; };

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  State state = State::kDone;
  bool has_started = false;
  int number = 0;
  uint3 index{};
  Where where;
  unsigned mask = 0;                   // of the exchange it waits in
  const unsigned char* slots = nullptr;
  std::vector<std::vector<Copy>> copies;  // groups, the last one open
  std::jmp_buf here;
  ucontext_t start;
  void* stack = nullptr;
};

struct Warp { unsigned char brought[32 * kSlotBytes], slots[32 * kSlotBytes]; };

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Fiber* current = nullptr;
std::jmp_buf scheduler;
const std::function<void()>* body = nullptr;
std::exception_ptr error;
int num_threads = 0, num_done = 0, num_at_barrier = 0, num_true = 0, last_true = 0;
std::vector<unsigned char> dynamic;

__attribute__((noinline)) void yield() {
  if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

void enter() {
  for (;;) {
    try {
      (*body)();
    } catch (...) {
      if (!error) error = std::current_exception();
    }
    current->state = State::kDone;
    ++num_done;
    yield();
  }
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.has_started) _longjmp(fiber.here, 1);
  fiber.has_started = true;
  getcontext(&fiber.start);
  if (!fiber.stack)
    fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

std::string thread_name(const Fiber& f) {
  return "thread " + std::to_string(f.number) + " of block (" + std::to_string(blockIdx.x) + ", " +
         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("cuda_host: " + message); }

std::string waits() {  // where the threads that do not go on are
  std::string text;
  for (int i = 0; i < num_threads; ++i) {
    const Fiber& f = *fibers[i];
    if (f.state == State::kDone || f.state == State::kReady) continue;
    if (i && fibers[i - 1]->state == f.state && fibers[i - 1]->where == f.where) continue;
    text += "; " + thread_name(f) + " waits in " + f.where.text();
  }
  for (int i = 0; i < num_threads; ++i)
    if (fibers[i]->state == State::kDone) return text + "; " + thread_name(*fibers[i]) + " has left the kernel";
  return text;
}

void run_block(bool downwards) {
  num_done = num_at_barrier = num_true = 0;
  for (int i = 0; i < num_threads; ++i) {
    Fiber& f = *fibers[i];
    f.state = State::kReady;
    f.number = i;
    f.index = {unsigned(i) % blockDim.x, unsigned(i) / blockDim.x % blockDim.y, unsigned(i) / (blockDim.x * blockDim.y)};
    f.copies.assign(1, {});
  }
  while (num_done < num_threads) {
    bool has_moved = false;
    for (int i = 0; i < num_threads; ++i) {
      Fiber& f = *fibers[downwards ? num_threads - 1 - i : i];
      if (f.state != State::kReady) continue;
      resume(f);
      has_moved = true;
      if (error) std::rethrow_exception(error);
    }
    if (!has_moved) fail("some threads wait for others that do not come" + waits());
  }
}

void fill_shared(size_t bytes) {
  if (__start_cuda_shared) std::memset(__start_cuda_shared, kNaN, __stop_cuda_shared - __start_cuda_shared);
  dynamic.assign(bytes + 2 * kGuardBytes + 256, kGuard);
  std::memset(shared_memory(), kNaN, bytes);
}

void check_shared(size_t bytes) {
  const unsigned char *begin = shared_memory(), *end = begin + bytes;
  for (const unsigned char* p = dynamic.data(); p < dynamic.data() + dynamic.size(); ++p)
    if ((p < begin || p >= end) && *p != kGuard)
      fail("dynamic shared memory of " + std::to_string(bytes) + " bytes written at byte " + std::to_string(p - begin) +
           " by block " + std::to_string(blockIdx.x));
}

}  // namespace

unsigned char* shared_memory() {  // aligned to 128 bytes, guards on both sides
  return reinterpret_cast<unsigned char*>((reinterpret_cast<size_t>(dynamic.data()) + kGuardBytes + 127) / 128 * 128);
}

int lane() { return current->number % 32; }

int barrier(bool predicate, const char* what, const char* file, int line) {
  Fiber& me = *current;
  me.where = {what, file, line};
  num_true += predicate;
  if (++num_at_barrier == num_threads) {
    for (int i = 0; i < num_threads; ++i)
      if (!(fibers[i]->where == me.where)) fail("threads of a block meet in different places: " + me.where.text() + waits());
    for (int i = 0; i < num_threads; ++i) fibers[i]->state = State::kReady;
    last_true = num_true;
    num_at_barrier = num_true = 0;
  } else {
    me.state = State::kAtBarrier;
    yield();
  }
  return last_true;
}

const unsigned char* exchange(unsigned mask, const void* mine, size_t bytes, const char* what, const char* file, int line) {
  Fiber& me = *current;
  const int first = me.number / 32 * 32, lanes = std::min(32, num_threads - first);
  Warp& warp = warps[me.number / 32];
  if (lanes < 32) mask &= (1u << lanes) - 1;
  me.where = {what, file, line};
  me.mask = mask;
  if (!(mask >> lane() & 1)) fail(thread_name(me) + " is not in the mask of " + me.where.text());
  std::memcpy(warp.brought + kSlotBytes * lane(), mine, bytes);
  me.state = State::kInWarp;
  for (int i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    const Fiber& other = *fibers[first + i];
    if (other.state != State::kInWarp) {  // not yet here
      yield();
      return warp.slots;
    }
    if (!(other.where == me.where) || other.mask != mask)
      fail("lanes of a warp meet in different places: " + me.where.text() + ", " + thread_name(other) + " in " +
           other.where.text());
  }
  for (int i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    std::memcpy(warp.slots + kSlotBytes * i, warp.brought + kSlotBytes * i, bytes);
    fibers[first + i]->state = State::kReady;
  }
  return warp.slots;
}

void async_copy(void* to, const void* from, size_t bytes, size_t zeros) {
  current->copies.back().push_back({to, from, bytes, zeros});
}
void async_commit() { current->copies.emplace_back(); }
void async_wait(int groups_in_flight) {
  auto& groups = current->copies;
  while (int(groups.size()) - 1 > groups_in_flight) {
    for (const Copy& c : groups.front()) {
      std::memcpy(c.to, c.from, c.bytes);
      std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.zeros);
    }
    groups.erase(groups.begin());
  }
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, size_t shared_limit, const std::function<void()>& thread) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64) fail("a block of " + std::to_string(threads) + " threads");
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) + ") blocks");
  if (shared_bytes > std::min<size_t>(shared_limit, 227 << 10))
    fail(std::to_string(shared_bytes) + " bytes of dynamic shared memory, more than was allowed");
  num_threads = int(threads);
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  warps.resize(std::max<size_t>(warps.size(), (threads + 31) / 32));
  gridDim = grid;
  blockDim = block;
  body = &thread;
  error = nullptr;
  uint64_t step = uint64_t(0.618 * double(blocks)) + 1;
  while (std::gcd(step, blocks) != 1) ++step;
  try {
    for (uint64_t i = 0, n = blocks / 2; i < blocks; ++i, n = (n + step) % blocks) {
      blockIdx = {unsigned(n % grid.x), unsigned(n / grid.x % grid.y), unsigned(n / grid.x / grid.y)};
      fill_shared(shared_bytes);
      run_block(i % 2 == 1);
      check_shared(shared_bytes);
    }
  } catch (...) {
    for (auto& f : fibers) f->has_started = false;  // those that were left in the middle start anew
    throw;
  }
}

}  // namespace cuda_host
