// The emulator's scheduler. Compiled without sanitizers even where kernels have them: its own memory, written by
// one fiber and read by the next, is no race of the kernel's. -DCUDA_EMULATOR_ASAN and -DCUDA_EMULATOR_TSAN make
// it tell the sanitizer about fibers.
#include "cuda_emulator.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/mman.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(CUDA_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers on this stack, its pointer in *from, and continues on the stack `to`.
extern "C" void cuda_emulator_switch(void** from, void* to);
asm(R"(
.text
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, . - cuda_emulator_switch
)");

namespace cuda_emulator {
namespace {

constexpr size_t PAGE = 4096, STACK = 128 << 10;
constexpr unsigned MAX_THREADS = 1024, MAX_MASKS = 8;  // masks: different ones that a warp uses in its life

// What the sanitizer has to know of a stack of execution.
struct Context {
  void* pointer = nullptr;  // saved stack pointer
  char* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan_fiber = nullptr;
};

// Tells ThreadSanitizer that what happened before release(t) happens before what follows acquire(t).
void release(void* token) {
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_release(token);
#else
  (void)token;
#endif
}
void acquire(void* token) {
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_acquire(token);
#else
  (void)token;
#endif
}

// A barrier that is used again and again: at its next use, which a thread may reach before another has left this
// one, it works with the other half.
struct Half {
  char token;
  int predicates;
  Slot slots[32];
};

// The lanes of a warp that take part in collectives with one mask.
struct Group {
  uint32_t mask;  // 0: not in use
  uint32_t uses[32];
  Half half[2];
};

enum class State { READY, AT_BLOCK, AT_WARP, DONE };

struct Thread {
  Context context;
  uint3 index;
  int number;
  State state;
  const char* where;
  uint32_t mask;
  int lane() const { return number % 32; }
  int warp() const { return number / 32; }
};

struct Launch {
  const char* kernel;
  const std::function<void()>* body;
  unsigned threads = 0;
  unsigned live = 0;
  void* shared = nullptr;
  Half block[2] = {};
  uint32_t block_uses[MAX_THREADS] = {};
  char done = 0;
  std::exception_ptr error;
};

std::vector<Thread> pool;                   // stacks are kept from launch to launch
Group groups[MAX_THREADS / 32][MAX_MASKS];  // by warp
Context scheduler;
Launch* active = nullptr;
Thread* running = nullptr;
uint32_t order_seed = 0;
int gpu_architecture = 80;
uint64_t switches = 0;
int shown_bug = 0;

void switch_context(Context& from, Context& to, bool leaving_for_good = false) {
  ++switches;
#if defined(CUDA_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(leaving_for_good ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  (void)leaving_for_good;
  cuda_emulator_switch(&from.pointer, to.pointer);
#if defined(CUDA_EMULATOR_ASAN)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(from.fake_stack, &stack, &size);
#endif
}

// Stops the calling thread until the scheduler finds that everyone it waits for has come.
void wait(State state, const char* where, uint32_t mask) {
  Thread& me = *running;
  me.state = state;
  me.where = where;
  me.mask = mask;
  switch_context(me.context, scheduler);
}

void enter() {
#if defined(CUDA_EMULATOR_ASAN)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  scheduler.stack = const_cast<char*>(static_cast<const char*>(stack));
  scheduler.stack_size = size;
#endif
  try {
    (*active->body)();
  } catch (...) {
    active->error = std::current_exception();
  }
  release(&active->done);
  running->state = State::DONE;
  --active->live;
  switch_context(running->context, scheduler, true);
  __builtin_unreachable();
}

// Fresh pages, in place of those of an earlier thread if there were any, above one that may not be touched: a
// stack that overflows stops the process instead of spoiling another.
char* map_stack(char* earlier) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (earlier == nullptr ? 0 : MAP_FIXED);
  void* pages =
      mmap(earlier == nullptr ? nullptr : earlier - PAGE, PAGE + STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages, PAGE, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<char*>(pages) + PAGE;
}

void prepare(Thread& thread) {
  Context& context = thread.context;
#if defined(CUDA_EMULATOR_TSAN)
  context.stack = map_stack(context.stack);  // else two blocks would seem to race for one stack
  if (context.tsan_fiber != nullptr) __tsan_destroy_fiber(context.tsan_fiber);
  context.tsan_fiber = __tsan_create_fiber(0);
#else
  if (context.stack == nullptr) context.stack = map_stack(nullptr);
#endif
  context.stack_size = STACK;
#if defined(CUDA_EMULATOR_ASAN)
  __asan_unpoison_memory_region(context.stack, STACK);  // a launch that failed left frames behind
#endif
  // As if `enter` had been called from nowhere and had saved six registers; its frame is aligned as the ABI wants.
  void** top = reinterpret_cast<void**>(context.stack + STACK) - 3;
  *--top = reinterpret_cast<void*>(enter);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.pointer = top;
}

std::string position(const uint3& p) {
  std::ostringstream text;
  text << '(' << p.x << ", " << p.y << ", " << p.z << ')';
  return text.str();
}

// The state of every thread of the block, neighbours in the same state together.
[[noreturn]] void fail(const std::string& what) {
  std::ostringstream text;
  text << "cuda_emulator: " << active->kernel << ": " << what << " in block " << position(blockIdx);
  for (unsigned first = 0, next; first < active->threads; first = next) {
    const auto state = [](const Thread& t) {
      std::ostringstream line;
      if (t.state == State::DONE) line << "exited";
      if (t.state == State::READY) line << "can run";
      if (t.state == State::AT_BLOCK) line << "waiting for the block at " << t.where;
      if (t.state == State::AT_WARP) line << "waiting for lanes 0x" << std::hex << t.mask << " at " << t.where;
      return line.str();
    };
    const std::string same = state(pool[first]);
    for (next = first + 1; next < active->threads && state(pool[next]) == same;) ++next;
    text << "\n  threads " << first << " to " << next - 1 << ": " << same;
  }
  throw std::runtime_error(text.str());
}

bool same_place(const Thread& a, const Thread& b) { return std::strcmp(a.where, b.where) == 0; }

// Lets go on whom every awaited thread has joined. False if nobody can.
bool release_waiting() {
  const unsigned n = active->threads;
  bool any = false;
  unsigned at_block = 0;
  for (unsigned i = 0; i < n; ++i) at_block += pool[i].state == State::AT_BLOCK;
  if (at_block == n) {
    for (unsigned i = 1; i < n; ++i)
      if (!same_place(pool[0], pool[i])) fail("threads meet at different barriers");
    active->block[active->block_uses[0] % 2].predicates = 0;  // the half after this one, not yet in use
    for (unsigned i = 0; i < n; ++i) pool[i].state = State::READY;
    return true;
  }
  for (unsigned i = 0; i < n; ++i) {
    if (pool[i].state != State::AT_WARP) continue;
    const unsigned first = i / 32 * 32;
    const uint32_t mask = pool[i].mask;
    bool complete = true;
    for (unsigned lane = 0; lane < 32 && complete; ++lane) {
      if (!(mask >> lane & 1)) continue;
      complete = first + lane < n && pool[first + lane].state == State::AT_WARP && pool[first + lane].mask == mask;
    }
    if (!complete) continue;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) {
        if (!same_place(pool[i], pool[first + lane])) fail("lanes meet at different collectives");
        pool[first + lane].state = State::READY;
      }
    any = true;
  }
  return any;
}

void run_block(std::mt19937& random, std::vector<unsigned>& order) {
  Launch& launch = *active;
  launch.live = launch.threads;
  for (unsigned warp = 0; warp < (launch.threads + 31) / 32; ++warp)
    for (Group& group : groups[warp]) {
      group.mask = 0;
      std::fill_n(group.uses, 32, 0);
    }
  std::fill_n(launch.block_uses, launch.threads, 0);
  launch.block[0].predicates = launch.block[1].predicates = 0;
  for (unsigned i = 0; i < launch.threads; ++i) {
    Thread& thread = pool[i];
    thread.number = i;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.state = State::READY;
    prepare(thread);
  }
  while (launch.live > 0) {
    if (order_seed != 0) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (unsigned i : order) {
      if (pool[i].state != State::READY) continue;
      running = &pool[i];
      threadIdx = running->index;
      switch_context(scheduler, running->context);
      if (launch.error) std::rethrow_exception(launch.error);
      progress = true;
    }
    if (launch.live > 0 && !release_waiting() && !progress) fail("a barrier that not all threads reach");
  }
}

void check_configuration(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const auto invalid = [&](const std::string& what) {
    throw std::runtime_error("cuda_emulator: " + std::string(kernel) + ": " + what);
  };
  const auto size = [](dim3 d) { return position(uint3{d.x, d.y, d.z}); };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    invalid("no GPU has a grid of " + size(grid) + " blocks");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > MAX_THREADS || block.z > 64)
    invalid("no GPU has a block of " + size(block) + " threads");
  const size_t most = (gpu_architecture < 80 ? 64 : 99) << 10;  // sm_75; the least from 8.0 on, sm_86 and sm_120
  if (shared_bytes > most)
    invalid("shared memory: expected at most " + std::to_string(most) + " bytes, which every sm_" +
            std::to_string(gpu_architecture) + " has, got " + std::to_string(shared_bytes));
  if (active != nullptr) invalid("launched from a kernel");
}

Group& group_of(const char* where, uint32_t mask) {
  if (!(mask >> running->lane() & 1)) fail(std::string(where) + ": the caller's lane is not in the mask");
  for (Group& group : groups[running->warp()]) {
    if (group.mask == 0) group.mask = mask;
    if (group.mask == mask) return group;
  }
  fail("a warp uses more masks than the emulator keeps");
}

// A loop that the compiler may not turn into memcpy, which ThreadSanitizer watches.
__attribute__((optimize("no-tree-loop-distribute-patterns"))) void copy(const void* from, size_t bytes, Slot& to) {
  for (size_t i = 0; i < bytes; ++i) to[i] = static_cast<const unsigned char*>(from)[i];
}

}  // namespace

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  check_configuration(kernel, grid, block, shared_bytes);
  blockDim = block;
  gridDim = grid;
  Launch launch;
  launch.kernel = kernel;
  launch.body = &thread;
  launch.threads = block.x * block.y * block.z;
  if (pool.size() < launch.threads) pool.resize(launch.threads);
#if defined(CUDA_EMULATOR_TSAN)
  scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  active = &launch;
  struct Reset {
    ~Reset() { active = nullptr; }
  } reset;

  std::mt19937 random(order_seed);
  std::vector<unsigned> order(launch.threads);
  for (unsigned i = 0; i < launch.threads; ++i) order[i] = i;
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t n = 0; n < blocks.size(); ++n) blocks[n] = n;
  if (order_seed != 0) std::shuffle(blocks.begin(), blocks.end(), random);
  // Kept until the end: were a block's memory given to the next, ThreadSanitizer would take them to be ordered.
  std::vector<std::unique_ptr<char[]>> shared(blocks.size());
  for (uint64_t n = 0; n < blocks.size(); ++n) {
    const uint64_t b = blocks[n];
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    shared[n].reset(new char[shared_bytes]);
    std::memset(shared[n].get(), 0xFF, shared_bytes);  // NaN in every floating-point type
    launch.shared = shared[n].get();
    run_block(random, order);
  }
  acquire(&launch.done);
}

void set_order(uint32_t seed) { order_seed = seed; }

void set_architecture(int architecture) { gpu_architecture = architecture; }
int architecture() { return gpu_architecture; }

uint64_t switch_count() { return switches; }

void show_bug(int number) { shown_bug = number; }
bool bug_shows(int number) { return shown_bug == number; }

void* dynamic_shared() { return active->shared; }

int lane() { return running->lane(); }

int synchronise_block(const char* where, bool predicate) {
  Half& half = active->block[active->block_uses[running->number]++ % 2];
  half.predicates += predicate;
  release(&half.token);
  wait(State::AT_BLOCK, where, 0);
  acquire(&half.token);
  return half.predicates;
}

void synchronise_warp(const char* where, uint32_t mask) {
  Group& group = group_of(where, mask);
  Half& half = group.half[group.uses[running->lane()]++ % 2];
  release(&half.token);
  wait(State::AT_WARP, where, mask);
  acquire(&half.token);
}

const Slot* exchange(const char* where, uint32_t mask, const void* mine, size_t bytes) {
  if (bytes > sizeof(Slot)) fail("a collective on more than 64 bytes");
  Group& group = group_of(where, mask);
  Half& half = group.half[group.uses[running->lane()]++ % 2];
  copy(mine, bytes, half.slots[running->lane()]);
  wait(State::AT_WARP, where, mask);
  return half.slots;
}

void require_lane(const char* where, uint32_t mask, int source) {
  if (!(mask >> source & 1))
    fail(std::string(where) + ": lane " + std::to_string(running->lane()) + " reads lane " +
         std::to_string(source) + ", which is not in the mask,");
}

void matrix_multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Multiplicand type) {
  if (gpu_architecture < 80 && type != Multiplicand::HALF) fail("mma: tensor cores before 8.0 have half alone,");
  struct Registers {
    uint32_t a[4], b[2];
  };
  const Registers mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Slot* all = exchange("mma", 0xFFFFFFFFu, &mine, sizeof(mine));
  const auto of = [all](int lane) {
    Registers registers;
    std::memcpy(&registers, all[lane], sizeof(registers));
    return registers;
  };

  const auto element = [type](uint32_t word, int n) {
    const uint16_t bits = static_cast<uint16_t>(n == 0 ? word : word >> 16);
    if (type == Multiplicand::HALF) return __half2float(__half(__half_raw{bits}));
    if (type == Multiplicand::BFLOAT16) return __uint_as_float(uint32_t{bits} << 16);
    return __uint_as_float(word & 0xFFFFE000u);  // the hardware ignores the low bits
  };
  const int per_register = type == Multiplicand::TF32 ? 1 : 2, K = 8 * per_register;
  for (int i = 0; i < 4; ++i) {
    const int row = running->lane() / 4 + i / 2 * 8, column = running->lane() % 4 * 2 + i % 2;
    for (int k = 0; k < K; ++k) {
      const int quad = k / per_register % 4, upper = k >= K / 2, n = k % per_register;
      const uint32_t left = of(row % 8 * 4 + quad).a[row / 8 + 2 * upper];
      const uint32_t right = of(column * 4 + quad).b[upper];
      c[i] += element(left, n) * element(right, n);
    }
  }
}

}  // namespace cuda_emulator
