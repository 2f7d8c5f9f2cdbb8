// csrc/cuda/port.h for a CPU: the same kernels, compiled by g++, on one fiber for each CUDA thread.
//
// One cluster runs at a time. Which fiber goes next is drawn at random, from a seed; a fiber runs until it waits. Bulk
// copies and messages to other blocks take effect at random times between their issue and the end of the wait for them,
// and what a load will overwrite reads as NaN until then: a missing wait shows as NaN or as an old value, a place that
// is given back too early as a wrong gradient, a barrier that nobody completes as a report of who waits where. What the
// PTX ISA leaves undefined and a host would do all the same ends the launch: a misaligned vector, copy or message, a
// message inside a block that is alone in its cluster, a wait or barrier by part of a warp, vectors that a copy on its
// way still writes or reads, more bytes at a barrier than it counts. So does what a driver refuses: no blocks, or more
// shared memory than there is.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define GRPO_KERNEL void
#define GRPO_DEVICE inline
#define GRPO_BOUNDS(threads)
#define GRPO_PARAMETERS const

namespace emulator {

constexpr size_t kStackBytes = 48 * 1024;
constexpr int kSharedBytes = 232448;  // that a block may use

// An mbarrier, as PTX describes it.
struct Phase {
  int arrivals = 0, pending = 0, bytes = 0;
  unsigned parity = 0;

  void complete_if_due() {
    if (pending > 0 || bytes != 0) return;
    parity ^= 1;
    pending = arrivals;
  }
};

// All of a group meet, and each may leave a value for the others: warp, block, cluster.
struct Meeting {
  int size = 0, present = 0;
  unsigned round = 0;
  uint64_t values[2][32];  // of a warp; read in one round while the next is filled
};

struct Block {
  int asleep = 0;  // rounds in which its fibers do not run
  std::vector<unsigned char> shared;
  Meeting meeting;
  std::vector<Meeting> warps;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<unsigned char[]> stack;
  bool started = false, ended = false;
  int thread = 0, block = 0;
  const char* waits_for = nullptr;
  bool (*may_go)(const Fiber&) = nullptr;
  const void* what = nullptr;
  unsigned number = 0;
  int groups = 0;           // of bulk stores, committed
  std::vector<int> unread;  // groups of stores whose source has not been read
};

// A copy or message on its way.
struct Transfer {
  unsigned char* to;
  const unsigned char* from;
  std::vector<unsigned char> message;  // instead of `from`
  int bytes;
  Phase* landed;  // loads and messages
  Fiber* reader;  // stores: who waits for the reading of the source
  int group;
  int rounds_left;
};

struct Machine {
  std::mt19937_64 random{0};
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<Transfer> transfers;
  Meeting cluster;
  int first_block = 0;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  void (*body)() = nullptr;
  std::string fault;
  int64_t bytes_loaded = 0, bytes_stored = 0;  // by bulk copies
  int blocks_launched = 0;                     // last
};

inline Machine& machine() {
  static Machine one;
  return one;
}
// Mostly few, sometimes many: whoever relies on somebody's being quick is found out.
inline int some_rounds() {
  std::mt19937_64& random = machine().random;
  return int(random() % (1u << random() % 7));
}
inline Fiber& self() { return *machine().current; }
inline Block& block() { return machine().blocks[self().block]; }

inline void must_be_aligned(const char* what, intptr_t bits) {
  if (bits & 15) machine().fault = std::string(what) + ": not aligned to 16 bytes";
}
// Whole vectors, at least one.
inline void must_be_vectors(const char* what, const void* to, const void* from, int bytes) {
  must_be_aligned(what, reinterpret_cast<intptr_t>(to) | reinterpret_cast<intptr_t>(from) | bytes);
  if (bytes <= 0) machine().fault = std::string(what) + ": of no bytes";
}
// A read may meet a copy that reads too, a write may meet none.
inline void must_be_free(const char* what, const void* place, int bytes, bool write) {
  const unsigned char* p = static_cast<const unsigned char*>(place);
  for (const Transfer& t : machine().transfers) {
    const bool written = t.landed && t.to < p + bytes && p < t.to + t.bytes;
    const bool read = write && t.reader && t.from < p + bytes && p < t.from + t.bytes;
    if (written || read)
      machine().fault = std::string(what) + ": a copy on its way " + (written ? "writes" : "reads") + " them";
  }
}

inline void yield_until(const char* why, bool (*may_go)(const Fiber&), const void* what, unsigned number) {
  Fiber& fiber = self();
  fiber.waits_for = why;
  fiber.may_go = may_go;
  fiber.what = what;
  fiber.number = number;
  if (_setjmp(fiber.at) == 0) _longjmp(machine().scheduler, 1);
}

// Returns the round that has just been completed.
inline unsigned meet(Meeting& meeting, const char* why) {
  const unsigned round = meeting.round;
  if (++meeting.present == meeting.size) {
    meeting.present = 0;
    ++meeting.round;
  } else {
    yield_until(
        why, [](const Fiber& f) { return static_cast<const Meeting*>(f.what)->round != f.number; }, &meeting, round);
  }
  return round;
}

inline void arrive(Phase& phase) {
  if (phase.pending <= 0) machine().fault = "more arrivals at a barrier than it was initialised for";
  --phase.pending;
  phase.complete_if_due();
}
inline void announce(Phase& phase, int bytes) {
  phase.bytes += bytes;
  if (abs(phase.bytes) >= 1 << 20) machine().fault = "more bytes at a barrier than it counts";
}
inline void landed(Phase& phase, int bytes) {
  announce(phase, -bytes);
  phase.complete_if_due();
}

inline void carry_out(size_t index) {
  Machine& m = machine();
  Transfer transfer = std::move(m.transfers[index]);
  m.transfers[index] = std::move(m.transfers.back());
  m.transfers.pop_back();
  memcpy(transfer.to, transfer.from ? transfer.from : transfer.message.data(), transfer.bytes);
  if (transfer.landed) landed(*transfer.landed, transfer.bytes);
  if (transfer.reader) {
    std::vector<int>& unread = transfer.reader->unread;
    unread.erase(std::find(unread.begin(), unread.end(), transfer.group));
  }
}

inline void entry() {
  Machine& m = machine();
  m.body();
  m.current->ended = true;
  _longjmp(m.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, entry, 0);
  setcontext(&fiber.start);
}

inline std::string who_waits() {
  std::string text = "deadlock:";
  int shown = 0;
  for (const Fiber& fiber : machine().fibers) {
    if (fiber.ended || fiber.thread % 32 != 0 || ++shown > 40) continue;
    text += " block " + std::to_string(fiber.block) + " warp " + std::to_string(fiber.thread / 32) + " at " +
            fiber.waits_for + ";";
  }
  return text;
}

// Fibers in a random order, round after round; now and then a block sleeps.
inline bool run_fibers(std::vector<Fiber*>& left) {
  Machine& m = machine();
  bool moved = false;
  std::shuffle(left.begin(), left.end(), m.random);
  for (Block& block : m.blocks) {
    if (block.asleep > 0) {
      --block.asleep;
    } else if (m.random() % 16 == 0) {
      block.asleep = some_rounds();
    }
    moved |= block.asleep > 0;
  }
  for (Fiber* fiber : left) {
    if (m.blocks[fiber->block].asleep > 0 || (fiber->may_go && !fiber->may_go(*fiber))) continue;
    fiber->may_go = nullptr;
    resume(*fiber);
    moved = true;
  }
  left.erase(std::remove_if(left.begin(), left.end(), [](Fiber* f) { return f->ended; }), left.end());
  return moved;
}

inline bool run_transfers() {
  std::vector<Transfer>& transfers = machine().transfers;
  const bool any = !transfers.empty();
  for (size_t i = 0; i < transfers.size();) {
    if (transfers[i].rounds_left-- > 0) {
      ++i;
    } else {
      carry_out(i);
    }
  }
  return any;
}

inline void run_cluster() {
  Machine& m = machine();
  std::vector<Fiber*> left;
  for (Fiber& fiber : m.fibers) left.push_back(&fiber);
  while (m.fault.empty() && (!left.empty() || !m.transfers.empty())) {
    const bool moved = run_fibers(left);
    if (!run_transfers() && !moved) m.fault = who_waits();
  }
}

// One launch at a time, from whichever thread.
inline std::mutex& turn() {
  static std::mutex one;
  return one;
}

inline void run(int blocks, int cluster, int threads, int shared_bytes, void (*body)()) {
  Machine& m = machine();
  m.body = body;
  m.fault.clear();
  m.blocks_launched = blocks;
  if (blocks <= 0 || cluster <= 0 || blocks % cluster) m.fault = "a launch of no blocks, or of part of a cluster";
  if (shared_bytes > kSharedBytes) m.fault = "more shared memory than a block may use";
  for (m.first_block = 0; m.first_block < blocks && m.fault.empty(); m.first_block += cluster) {
    m.transfers.clear();
    m.cluster = Meeting{};
    m.cluster.size = cluster * threads;
    m.blocks = std::vector<Block>(cluster);
    for (Block& block : m.blocks) {
      block.shared.assign(shared_bytes + 128, 0xff);
      block.meeting.size = threads;
      block.warps.resize(threads / 32);
      for (Meeting& warp : block.warps) warp.size = 32;
    }
    if (m.fibers.size() != size_t(cluster) * threads) m.fibers = std::vector<Fiber>(size_t(cluster) * threads);
    for (size_t i = 0; i < m.fibers.size(); ++i) {
      Fiber& fiber = m.fibers[i];
      if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
      fiber.started = fiber.ended = false;
      fiber.may_go = nullptr;
      fiber.waits_for = "its start";
      fiber.groups = 0;
      fiber.unread.clear();
      fiber.thread = int(i % threads);
      fiber.block = int(i / threads);
    }
    run_cluster();
  }
}

}  // namespace emulator

namespace port {

using Stream = void*;
constexpr bool kEmulated = true;

inline int thread_index() { return emulator::self().thread; }
inline int block_index() { return emulator::machine().first_block + emulator::self().block; }

inline unsigned char* shared_start(emulator::Block& block) {
  return block.shared.data() + (-reinterpret_cast<intptr_t>(block.shared.data()) & 127);
}
// The same place in another block of the cluster.
template <class V>
V* there(V* mine, int rank) {
  emulator::Machine& m = emulator::machine();
  if (rank >= int(m.blocks.size())) m.fault = "no such block in the cluster";
  const auto offset = reinterpret_cast<unsigned char*>(mine) - shared_start(emulator::block());
  return reinterpret_cast<V*>(shared_start(m.blocks[rank % m.blocks.size()]) + offset);
}
template <class Layout>
Layout& shared() {
  return *reinterpret_cast<Layout*>(shared_start(emulator::block()));
}

inline void sync_block() { emulator::meet(emulator::block().meeting, "sync_block"); }
inline void sync_warp() { emulator::meet(emulator::block().warps[thread_index() / 32], "sync_warp"); }
inline void sync_cluster() { emulator::meet(emulator::machine().cluster, "sync_cluster"); }

template <class V>
V shuffle(V value, int lane) {
  emulator::Meeting& warp = emulator::block().warps[thread_index() / 32];
  memcpy(&warp.values[warp.round & 1][thread_index() % 32], &value, sizeof(V));
  const unsigned round = emulator::meet(warp, "shuffle");
  memcpy(&value, &warp.values[round & 1][lane], sizeof(V));
  return value;
}
template <class V>
V shuffle_xor(V value, int mask) {
  return shuffle(value, thread_index() % 32 ^ mask);
}

struct Barrier {
  emulator::Phase phase;

  void init(int arrivals) {
    phase = emulator::Phase{};
    phase.arrivals = phase.pending = arrivals;
  }
  void arrive() { emulator::arrive(phase); }
  void arrive_at(int rank) { emulator::arrive(there(this, rank)->phase); }
  void expect(int bytes) { emulator::announce(phase, bytes); }
  void wait(unsigned parity) {
    if (phase.parity == parity) {
      emulator::yield_until(
          "a barrier",
          [](const emulator::Fiber& f) { return static_cast<const Barrier*>(f.what)->phase.parity != f.number; }, this,
          parity);
    }
    sync_warp();
  }
  void wait_for_cluster(unsigned parity) { wait(parity); }
};

inline void fence_barriers() {}
inline void fence_for_bulk() {}

inline void bulk_load(void* to, const void* from, int bytes, Barrier& landed) {
  emulator::must_be_vectors("a bulk load", to, from, bytes);
  emulator::must_be_free("bytes of a bulk load", to, bytes, true);
  memset(to, 0xff, bytes);
  emulator::machine().bytes_loaded += bytes;
  emulator::machine().transfers.push_back({static_cast<unsigned char*>(to),
                                           static_cast<const unsigned char*>(from),
                                           {},
                                           bytes,
                                           &landed.phase,
                                           nullptr,
                                           0,
                                           emulator::some_rounds()});
}
inline void bulk_store(void* to, const void* from, int bytes) {
  emulator::must_be_vectors("a bulk store", to, from, bytes);
  emulator::Fiber& fiber = emulator::self();
  fiber.unread.push_back(fiber.groups);
  emulator::machine().bytes_stored += bytes;
  emulator::machine().transfers.push_back({static_cast<unsigned char*>(to),
                                           static_cast<const unsigned char*>(from),
                                           {},
                                           bytes,
                                           nullptr,
                                           &fiber,
                                           fiber.groups,
                                           emulator::some_rounds()});
}
inline void bulk_commit() { ++emulator::self().groups; }
template <int kPending>
void bulk_wait_read() {
  const auto read = [](const emulator::Fiber& f) {
    return std::none_of(f.unread.begin(), f.unread.end(), [&](int group) { return group < f.groups - int(f.number); });
  };
  emulator::self().number = kPending;
  if (!read(emulator::self())) emulator::yield_until("bulk_wait_read", read, nullptr, kPending);
}

inline void send(int rank, void* slot, const uint32_t (&words)[4], Barrier& landed) {
  emulator::Machine& m = emulator::machine();
  if (m.blocks.size() < 2) m.fault = "a message in a cluster of one block";
  emulator::must_be_aligned("a message", reinterpret_cast<intptr_t>(slot));
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(words);
  m.transfers.push_back({there(static_cast<unsigned char*>(slot), rank),
                         nullptr,
                         {bytes, bytes + 16},
                         16,
                         &there(&landed, rank)->phase,
                         nullptr,
                         0,
                         emulator::some_rounds()});
}

inline float exp2_of(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0 : y;  // as the GPU's, which knows no denormal numbers here
}
inline double exp2_of(double x) { return exp2(x); }
inline float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
inline double fma_of(double a, double b, double c) { return fma(a, b, c); }
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

struct alignas(16) Words {
  uint32_t word[4];
};
inline Words load_words(const void* p) {
  emulator::must_be_aligned("16 bytes read", reinterpret_cast<intptr_t>(p));
  emulator::must_be_free("16 bytes read", p, 16, false);
  Words words;
  memcpy(&words, p, sizeof words);
  return words;
}
inline void store_words(void* p, const Words& words) {
  emulator::must_be_aligned("16 bytes written", reinterpret_cast<intptr_t>(p));
  emulator::must_be_free("16 bytes written", p, 16, true);
  memcpy(p, &words, sizeof words);
}

inline uint32_t shifted(uint32_t low, uint32_t high, int bits) {
  return uint32_t((uint64_t(high) << 32 | low) >> bits);
}

inline uint32_t bfloat16_bits(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = bits_of(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
inline uint32_t float16_bits(float x) {
  const _Float16 half = _Float16(x);
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline float float16_value(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, sizeof bits);
  return float(half);
}
inline uint32_t bfloat16_pair(float low, float high) { return bfloat16_bits(low) | bfloat16_bits(high) << 16; }
inline uint32_t float16_pair(float low, float high) { return float16_bits(low) | float16_bits(high) << 16; }
inline void float16_unpair(uint32_t bits, float& low, float& high) {
  low = float16_value(uint16_t(bits));
  high = float16_value(uint16_t(bits >> 16));
}

inline const char* error_text(int) { return emulator::machine().fault.c_str(); }
inline int use_device(int) { return 0; }

// What the fibers of a launch run; kernels take one struct.
template <class Parameters>
struct Launch {
  static inline void (*kernel)(Parameters) = nullptr;
  static inline const Parameters* parameters = nullptr;
  static void body() { kernel(*parameters); }
};

template <class Parameters>
int launch(void (*kernel)(Parameters), int blocks, int cluster, int threads, int shared_bytes, Stream,
           const Parameters& parameters) {
  const std::lock_guard<std::mutex> guard(emulator::turn());
  Launch<Parameters>::kernel = kernel;
  Launch<Parameters>::parameters = &parameters;
  emulator::run(blocks, cluster, threads, shared_bytes, Launch<Parameters>::body);
  return emulator::machine().fault.empty() ? 0 : 1;
}

// An imagined device of the H200's shape, so that a row is laid out as there.
template <class Parameters>
int clusters_at_once(void (*)(Parameters), int cluster, int, int, int32_t& found) {
  found = cluster == 16 ? 0 : 4 / cluster + 1;
  return 0;
}
inline int load(const void*, int, int32_t&) { return 0; }
template <class Device>
int describe(int, Device& device) {
  device.major = 9;
  device.minor = 0;
  device.driver = device.runtime = 0;
  device.shared_bytes = emulator::kSharedBytes;
  return 0;
}

}  // namespace port

#define GRPO_EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

GRPO_EMULATOR_EXPORT void grpo_emulator_seed(uint64_t seed) { emulator::machine().random.seed(seed); }
// Since the last time it was asked.
GRPO_EMULATOR_EXPORT int64_t grpo_emulator_bytes_loaded() { return std::exchange(emulator::machine().bytes_loaded, 0); }
GRPO_EMULATOR_EXPORT int64_t grpo_emulator_bytes_stored() { return std::exchange(emulator::machine().bytes_stored, 0); }
GRPO_EMULATOR_EXPORT int32_t grpo_emulator_blocks_launched() { return emulator::machine().blocks_launched; }
