// Runs kernels as emulated.h says. Each thread of a block is a fiber, with a stack of its own.
#undef _FORTIFY_SOURCE  // its longjmp refuses to go to another stack

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "emulated_ptx.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sk { alignas(1024) char smem[227 * 1024]; }

namespace emulated {

bool warpgroups = true;

namespace {

constexpr unsigned kThreads = 640;  // the most of a block
constexpr std::size_t kStackBytes = 64 * 1024;

enum class State { kReady, kAtBarrier, kAtPhase, kInWarp, kExited };

struct Copy {
  unsigned to;
  const void* from;
  unsigned bytes, group;
};

// Copies in bulk arrive when all threads have and the first one waits for them.
struct Barrier {
  unsigned count;    // of arrivals, for a phase
  unsigned missing;  // of them
  unsigned phases;   // that are over
  std::vector<Copy> copies;
};

struct Thread {
  State state = State::kExited;
  bool has_stack = false;  // in use: `here` is where it goes on
  jmp_buf here;
  unsigned barrier;  // that it waits at
  unsigned phase;    // of it, where it has phases
  // Of the meeting it waits in.
  const char* name;
  Run* run;
  void* mine;
  std::vector<Copy> copies;  // not yet waited for, the oldest first
  unsigned group;            // of the next copy
  bool has_waited;           // for the last kernel
};

// How many of a warp are in each state but kReady, and the instruction where some wait.
struct Warp {
  unsigned at_barrier, in_warp, exited;
  const char* name;
};

constexpr unsigned kBarriers = 16;

Thread threads[kThreads];
Warp warps[kThreads / kWarp];
unsigned waiting[kBarriers], exited;   // threads of the block
std::map<unsigned, Barrier> barriers;  // of the block, by address
unsigned current;                      // thread
jmp_buf scheduler;
bool backward, failed;
std::string error;
unsigned smem_bytes;
const Entry* kernel;
void** arguments;

std::vector<const Entry*>& table() {
  static std::vector<const Entry*> entries;  // made before the first entry
  return entries;
}

const Entry* find(const char* name) {
  for (const Entry* entry : table()) {
    if (!std::strcmp(entry->name, name)) return entry;
  }
  return nullptr;
}

// Fibers

char* stack_of(unsigned thread) {
  static const std::size_t page = sysconf(_SC_PAGESIZE);
  static char* const stacks = [] {
    void* all = mmap(nullptr, kThreads * (kStackBytes + page), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (unsigned i = 0; all != MAP_FAILED && i < kThreads; ++i) {
      mprotect(static_cast<char*>(all) + i * (kStackBytes + page), page, PROT_NONE);
    }
    return static_cast<char*>(all);
  }();
  if (stacks == MAP_FAILED) return nullptr;
  return stacks + thread * (kStackBytes + page) + page;
}

void leave() {
  if (_setjmp(threads[current].here) == 0) _longjmp(scheduler, 1);
}

void check_barrier(unsigned barrier, unsigned all);
void check_warp(unsigned warp);

// Runs its thread in one block after the other.
void fiber() {
  for (;;) {
    kernel->caller(kernel->kernel, arguments);
    threads[current].state = State::kExited;
    threads[current].copies.clear();
    ++exited, ++warps[current / kWarp].exited;
    check_barrier(0, blockDim.x - exited);
    check_warp(current / kWarp);
    leave();
  }
}

// Until it waits, exits or fails.
void resume(unsigned thread) {
  current = thread;
  threadIdx = {thread, 0, 0};
  if (_setjmp(scheduler)) return;
  Thread& t = threads[thread];
  if (t.has_stack) _longjmp(t.here, 1);
  t.has_stack = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack_of(thread);
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber, 0);
  setcontext(&context);
}

// Waiting

// A barrier opens when all that it waits for have come.
void check_barrier(unsigned barrier, unsigned all) {
  if (!waiting[barrier] || waiting[barrier] < all) return;
  for (unsigned i = 0; i < blockDim.x; ++i) {
    Thread& t = threads[i];
    if (t.state != State::kAtBarrier || t.barrier != barrier) continue;
    t.state = State::kReady;
    --warps[i / kWarp].at_barrier;
  }
  waiting[barrier] = 0;
}

// The lanes of a warp go on when all that live have come.
void check_warp(unsigned warp) {
  Warp& mine = warps[warp];
  if (!mine.in_warp || mine.in_warp + mine.exited < kWarp) return;
  Thread* lanes = threads + warp * kWarp;
  Run* run = nullptr;
  void* brought[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane].state == State::kExited) continue;
    run = lanes[lane].run;
    brought[lane] = lanes[lane].mine;
    lanes[lane].state = State::kReady;
  }
  mine.in_warp = 0;
  run(brought);
}

// Whether the phase that a thread waits for is over, now that it does.
bool is_over(const Thread& thread) {
  Barrier& barrier = barriers[thread.barrier];
  if (barrier.phases % 2 != thread.phase) return true;
  if (barrier.missing) return false;
  for (const Copy& copy : barrier.copies) std::memcpy(sk::smem + copy.to, copy.from, copy.bytes);
  barrier.copies.clear();
  barrier.missing = barrier.count;
  ++barrier.phases;
  return true;
}

std::string who_waits() {
  std::string text = "deadlock:";
  for (unsigned i = 0; i < blockDim.x; ++i) {
    const Thread& t = threads[i];
    const char* at = t.state == State::kAtPhase     ? "wait_barrier"
                     : t.state != State::kAtBarrier ? t.name
                     : t.barrier                    ? "sync_warps"
                                                    : "__syncthreads";
    if (t.state == State::kExited) continue;
    text += " thread " + std::to_string(i) + " waits in " + at + ",";
    if (text.size() > 100) break;
  }
  return text + " " + std::to_string(exited) + " have exited";
}

// The shared memory from there on.
bool is_untouched(const char* from) {
  return *from == '\xff' && !std::memcmp(from, from + 1, std::end(sk::smem) - from - 1);
}

void run_block() {
  std::memset(sk::smem, 0xff, sizeof sk::smem);  // NaNs
  barriers.clear();
  for (unsigned i = 0; i < blockDim.x; ++i) {
    threads[i].state = State::kReady;
    threads[i].group = 0;
    threads[i].has_waited = !kernel->is_early;
  }
  std::fill(std::begin(warps), std::end(warps), Warp{});
  std::fill(std::begin(waiting), std::end(waiting), 0);
  exited = 0;
  const unsigned count = blockDim.x / kWarp;
  bool any = true;
  while (any) {
    any = false;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned warp = backward ? count - 1 - i : i;
      // A warp goes as far as it can, ahead of the others.
      for (bool again = true; again;) {
        again = false;
        for (unsigned j = 0; j < kWarp; ++j) {
          const unsigned thread = warp * kWarp + (backward ? kWarp - 1 - j : j);
          if (threads[thread].state == State::kAtPhase && is_over(threads[thread])) {
            threads[thread].state = State::kReady;
          }
          if (threads[thread].state != State::kReady) continue;
          resume(thread);
          if (failed) return;
          again = any = true;
        }
      }
    }
  }
  failed = true;
  if (exited < blockDim.x) {
    error = who_waits();
  } else if (smem_bytes < sizeof sk::smem && !is_untouched(sk::smem + smem_bytes)) {
    error = "shared memory beyond the " + std::to_string(smem_bytes) + " bytes was written";
  } else {
    failed = false;
  }
}

}  // namespace

Entry::Entry(const char* name, Kernel* kernel, void (*caller)(Kernel*, void**),
             const char* signature, bool is_early)
    : name(name), kernel(kernel), caller(caller), signature(signature), is_early(is_early) {
  table().push_back(this);
}

void fail(const char* format, ...) {
  char text[200];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  error = "thread " + std::to_string(current) + ": " + text;
  failed = true;
  _longjmp(scheduler, 1);
}

void wait_for_warps(unsigned barrier, unsigned of_warps) {
  if (barrier >= kBarriers) fail("a barrier %u of %u", barrier, kBarriers);
  Warp& warp = warps[current / kWarp];
  if (warp.in_warp) fail("divergence: a barrier, and others of its warp in a warp's instruction");
  Thread& me = threads[current];
  me.state = State::kAtBarrier;
  me.barrier = barrier;
  ++warp.at_barrier, ++waiting[barrier];
  check_barrier(barrier, barrier ? of_warps * kWarp : blockDim.x - exited);
  if (me.state != State::kReady) leave();
}

// Ends the launch if a lane of the warp cannot come.
void check_lanes(const char* name, bool all) {
  const unsigned first = current / kWarp * kWarp;
  for (unsigned i = first; i < first + kWarp; ++i) {
    const Thread& t = threads[i];
    if (t.state == State::kAtBarrier) fail("divergence: %s, thread %u at a barrier", name, i);
    if (t.state == State::kInWarp && std::strcmp(t.name, name)) {
      fail("divergence: %s, thread %u in %s", name, i, t.name);
    }
    if (t.state == State::kExited && all) fail("divergence: %s, thread %u has exited", name, i);
  }
}

void meet(const char* name, Run* run, void* mine, bool all) {
  Warp& warp = warps[current / kWarp];
  if (warp.at_barrier || (warp.exited && all) || (warp.in_warp && warp.name != name)) {
    check_lanes(name, all);
  }
  Thread& me = threads[current];
  me.state = State::kInWarp;
  me.name = warp.name = name;
  me.run = run;
  me.mine = mine;
  ++warp.in_warp;
  check_warp(current / kWarp);
  if (me.state != State::kReady) leave();
}

void wait_for_last_kernel() { threads[current].has_waited = true; }

bool reads_early() { return backward && !threads[current].has_waited; }

void run_nothing(void* const (&)[kWarp]) {}

void run_shuffle(void* const (&lanes)[kWarp]) {
  for (void* lane : lanes) {
    if (!lane) continue;
    auto& mine = *static_cast<Shuffle*>(lane);
    const auto* from = static_cast<Shuffle*>(lanes[static_cast<unsigned>(mine.from) % kWarp]);
    if (!from) fail("__shfl_sync: from lane %d, which has exited", mine.from);
    mine.result = from->value;
  }
}

// Shared memory

char* shared_bytes(const char* what, unsigned at, unsigned bytes) {
  if (at > smem_bytes || bytes > smem_bytes - at) {
    fail("%s: shared bytes %u to %u of %u", what, at, at + bytes, smem_bytes);
  }
  if (at % bytes) fail("%s: %u bytes at %u are not aligned", what, bytes, at);
  return sk::smem + at;
}

void begin_copy(unsigned to, const void* from, unsigned bytes) {
  if (reinterpret_cast<std::uintptr_t>(from) % bytes) {
    fail("copy_async: %u bytes from %p are not aligned", bytes, from);
  }
  std::memset(shared_bytes("copy_async", to, bytes), 0xff, bytes);
  threads[current].copies.push_back({to, from, bytes, threads[current].group});
}

void commit() { ++threads[current].group; }

void wait_for_copies(unsigned groups) {
  Thread& t = threads[current];
  auto copy = t.copies.begin();
  for (; copy != t.copies.end() && copy->group + groups < t.group; ++copy) {
    std::memcpy(sk::smem + copy->to, copy->from, copy->bytes);
  }
  t.copies.erase(t.copies.begin(), copy);
}

// Copies in bulk

void init_barrier(unsigned barrier, unsigned count) {
  shared_bytes("init_barrier", barrier, 8);
  barriers[barrier] = {count, count, 0, {}};
}

Barrier& barrier_at(const char* what, unsigned at) {
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail("%s: there is no barrier at %u", what, at);
  return found->second;
}

void arrive_at(unsigned at) {
  Barrier& barrier = barrier_at("arrive_at", at);
  if (!barrier.missing) fail("arrive_at: the last copy of its barrier is under way");
  if (--barrier.missing || !barrier.copies.empty()) return;
  barrier.missing = barrier.count;
  ++barrier.phases;
}

void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned at) {
  if (reinterpret_cast<std::uintptr_t>(from) % 16 || to % 16 || bytes % 16 || !bytes) {
    fail("copy_bulk: %u bytes from %p to %u are not aligned", bytes, from, to);
  }
  if (to > smem_bytes || bytes > smem_bytes - to) {
    fail("copy_bulk: shared bytes %u to %u of %u", to, to + bytes, smem_bytes);
  }
  barrier_at("copy_bulk", at).copies.push_back({to, from, bytes, 0});
  arrive_at(at);
  std::memset(sk::smem + to, 0xff, bytes);
}

void wait_barrier(unsigned at, unsigned phase) {
  barrier_at("wait_barrier", at);
  Thread& me = threads[current];
  me.barrier = at;
  me.phase = phase;
  if (is_over(me)) return;
  me.state = State::kAtPhase;
  leave();
}

// Tensor cores

void run_load_matrices(void* const (&lanes)[kWarp]) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const unsigned at = static_cast<Matrices*>(lanes[8 * i + lane / 4])->row;
      const char* row = shared_bytes("load_matrices", at, 16);
      std::memcpy(&static_cast<Matrices*>(lanes[lane])->out[i], row + lane % 4 * 4, 4);
    }
  }
}

void run_load_matrices_transposed(void* const (&lanes)[kWarp]) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const int column = lane / 4, row = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      unsigned short pair[2];
      for (int r = 0; r < 2; ++r) {
        const unsigned at = static_cast<Matrices*>(lanes[8 * i + row + r])->row;
        std::memcpy(&pair[r], shared_bytes("load_matrices_transposed", at, 16) + column * 2, 2);
      }
      static_cast<Matrices*>(lanes[lane])->out[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
  }
}

// One half of a pair.
float number(unsigned pair, int half, bool is_bf16) {
  const unsigned bits = half ? pair >> 16 : pair & 0xffffu;
  return is_bf16 ? __uint_as_float(bits << 16) : sk::f16_to_float(bits);
}

// Rows of 16 columns, as the lanes hold them: g * 4 + t has row g and, in its upper half, g + 8.
void decode_rows(void* const (&lanes)[kWarp], const unsigned* (*a)(const void*), bool is_bf16,
                 float (&w)[16][16]) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const unsigned* words = a(lanes[row % 8 * 4 + k % 8 / 2]);
      w[row][k] = number(words[k / 8 * 2 + row / 8], k % 2, is_bf16);
    }
  }
}

// Of both factors a row: a sum's terms come in this order.
float add_products(float sum, const float (&w)[16], const float (&x)[16]) {
  for (int k = 0; k < 16; ++k) sum += w[k] * x[k];
  return sum;
}

void run_mma(void* const (&lanes)[kWarp]) {
  const auto of = [&](int lane) -> const DenseMma& { return *static_cast<DenseMma*>(lanes[lane]); };
  const bool is_bf16 = of(0).is_bf16;
  float w[16][16], x[8][16];
  decode_rows(
      lanes, [](const void* lane) { return static_cast<const DenseMma*>(lane)->a; }, is_bf16, w);
  for (int col = 0; col < 8; ++col) {
    for (int k = 0; k < 16; ++k) {
      x[col][k] = number(of(col * 4 + k % 8 / 2).b[k / 8], k % 2, is_bf16);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      float& c = of(lane).c[i];
      c = add_products(c, w[lane / 4 + i / 2 * 8], x[lane % 4 * 2 + i % 2]);
    }
  }
}

void run_mma_group(void* const (&lanes)[kWarp]) {
  const auto of = [&](int lane) -> const GroupMma& { return *static_cast<GroupMma*>(lanes[lane]); };
  const bool is_bf16 = of(0).is_bf16;
  const unsigned first = (of(0).b & 0x3fff) << 4;
  if (of(0).b >> 14 != (64ull << 18 | 1ull << 48 | 1ull << 2)) {
    fail("mma_warpgroup: operand %#llx has another layout", of(0).b);
  }
  for (int lane = 1; lane < kWarp; ++lane) {
    if (of(lane).b != of(0).b) fail("mma_warpgroup: lanes with other operands");
  }
  float w[16][16];
  decode_rows(
      lanes, [](const void* lane) { return static_cast<const GroupMma*>(lane)->a; }, is_bf16, w);
  for (int token = 0; token < of(0).tiles * 8; ++token) {
    float x[16];
    for (int k = 0; k < 16; ++k) {
      const unsigned at = first + token / 8 * 1024 + token % 8 * 128 + k * 2;
      unsigned short bits;
      std::memcpy(&bits, shared_bytes("mma_warpgroup", at ^ (at >> 7 & 7) << 4, 2), 2);
      x[k] = number(bits, 0, is_bf16);
    }
    for (int row = 0; row < 16; ++row) {
      float& c = of(row % 8 * 4 + token % 8 / 2).c[token / 8 * 4 + row / 8 * 2 + token % 2];
      c = add_products(c, w[row], x);
    }
  }
}

void run_mma_sparse(void* const (&lanes)[kWarp]) {
  const auto of = [&](int lane) -> const SparseMma& {
    return *static_cast<SparseMma*>(lanes[lane]);
  };
  const bool is_bf16 = of(0).is_bf16;
  float b[32][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 8; ++i) {
      b[i / 2 * 8 + lane % 4 * 2 + i % 2][lane / 4] = number(of(lane).b[i / 2], i % 2, is_bf16);
    }
  }
  for (int row = 0; row < 16; ++row) {
    const int g = row % 8, upper = row / 8;
    float sums[8];
    for (int col = 0; col < 8; ++col) sums[col] = of(g * 4 + col / 2).c[upper * 2 + col % 2];
    for (int group = 0; group < 8; ++group) {
      const unsigned a = of(g * 4 + group % 4).a[group / 4 * 2 + upper];
      const unsigned all = of(g * 4 + 2 * of(0).selector + group / 4).positions;
      const unsigned two = all >> (upper * 16 + group % 4 * 4) & 15;
      if (two % 4 == two / 4) {
        fail("mma_sparse: row %d, group %d has position %u twice", row, group, two % 4);
      }
      for (int half = 0; half < 2; ++half) {
        const float value = number(a, half, is_bf16);
        const float* x = b[group * 4 + (two >> 2 * half & 3)];
        for (int col = 0; col < 8; ++col) sums[col] += value * x[col];
      }
    }
    for (int col = 0; col < 8; ++col) of(g * 4 + col / 2).c[upper * 2 + col % 2] = sums[col];
  }
}

}  // namespace emulated

namespace sk {

unsigned shared_address(const void* pointer) {
  const auto at =
      reinterpret_cast<std::uintptr_t>(pointer) - reinterpret_cast<std::uintptr_t>(smem);
  if (at > sizeof smem) emulated::fail("shared_address: %p is not in shared memory", pointer);
  return static_cast<unsigned>(at);
}

unsigned short round_to_bf16(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static unsigned round_to_e4m3(float value) {
  const unsigned sign = __float_as_uint(value) >> 24 & 0x80;
  if (value != value) return 0x7f;
  const float size = fminf(fabsf(value), 448);
  if (size < 0x1p-6f) return sign | static_cast<unsigned>(nearbyintf(size * 0x1p9f));
  const unsigned bits = __float_as_uint(size);
  return sign | ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (127 - 7 << 3);
}

unsigned round_to_e4m3(float low, float high) {
  return round_to_e4m3(low) | round_to_e4m3(high) << 8;
}

static float value_of_e4m3(unsigned code) {
  const unsigned exponent = code >> 3 & 15, mantissa = exponent ? 8 + code % 8 : code % 8;
  if ((code & 0x7f) == 0x7f) return __uint_as_float(0x7fffffff);
  const float size = ldexpf(static_cast<float>(mantissa), (exponent ? exponent : 1) - 10);
  return code & 0x80 ? -size : size;
}

float sum_of_e4m3(unsigned pair) {
  return value_of_e4m3(pair & 0xff) + value_of_e4m3(pair >> 8 & 0xff);
}

unsigned e4m3_to_f16(unsigned pair) {
  return round_to_f16(value_of_e4m3(pair & 0xff)) | round_to_f16(value_of_e4m3(pair >> 8 & 0xff))
                                                        << 16;
}

unsigned add_f16(unsigned a, unsigned b) {
  unsigned sums = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto number = [&](unsigned two) {
      return f16_to_float(static_cast<unsigned short>(two >> shift));
    };
    sums |= round_to_f16(number(a) + number(b)) << shift;
  }
  return sums;
}

unsigned multiply_add_bf16(unsigned a, unsigned b, unsigned c) {
  unsigned sums = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto number = [&](unsigned two) { return __uint_as_float(two >> shift << 16); };
    // A product of two bfloat16 is exact in float; here the sums are, too.
    sums |= round_to_bf16(number(a) * number(b) + number(c)) << shift;
  }
  return sums;
}

unsigned short round_to_f16(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000;
  const unsigned size = bits & 0x7fffffff;
  if (value != value) return 0x7fff;
  unsigned rounded;
  if (size < 0x38800000) {  // below 2^-14: steps of 2^-24
    rounded = static_cast<unsigned>(nearbyintf(fabsf(value) * 0x1p24f));
  } else {
    rounded = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  }
  return static_cast<unsigned short>(sign | std::min(rounded, 0x7c00u));
}

float f16_to_float(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(fraction * 0x1p-24f));
  return __uint_as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

}  // namespace sk

extern "C" {

// Threads, warps and blocks run from the last to the first.
void emu_backward(int yes) { emulated::backward = yes; }

// Whether warpgroups multiply together, as on sm_90a.
void emu_warpgroups(int yes) { emulated::warpgroups = yes; }

// Of the i-th kernel; null beyond the last.
const char* emu_kernel(unsigned i) {
  return i < emulated::table().size() ? emulated::table()[i]->name : nullptr;
}

const char* emu_signature(const char* name) {
  const emulated::Entry* entry = emulated::find(name);
  return entry ? entry->signature : nullptr;
}

// Null, or what went wrong. args[i] points to the i-th argument.
const char* emu_launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned block,
                       unsigned smem_bytes, void** args) {
  using namespace emulated;
  kernel = find(name);
  if (!kernel) return "unknown kernel";
  if (!grid_x || !grid_y || !block || block % kWarp || block > kThreads) {
    return "a grid of no blocks, or blocks that are no whole warps up to 640 threads";
  }
  if (smem_bytes > sizeof sk::smem) return "more than 227 KB of shared memory";
  if (!stack_of(0)) return "no memory for stacks";
  arguments = args;
  emulated::smem_bytes = smem_bytes;
  gridDim = {grid_x, grid_y, 1};
  blockDim = {block, 1, 1};
  failed = false;
  const unsigned blocks = grid_x * grid_y;
  for (unsigned i = 0; i < blocks && !failed; ++i) {
    const unsigned at = backward ? blocks - 1 - i : i;
    blockIdx = {at % grid_x, at / grid_x, 0};
    run_block();
  }
  if (!failed) return nullptr;
  error =
      "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + "), " + error;
  for (Thread& t : threads) {  // stacks are left as they are
    t.has_stack = false;
    t.state = State::kExited;
    t.copies.clear();
  }
  return error.c_str();
}
}
