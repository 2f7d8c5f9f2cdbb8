// Blocks of memory for gradients, whole pages of the system. The last one of a kind that came back is kept for the
// next: pages that were in use cost a tenth of fresh ones (docs/design/cpu.md). What is kept is the system's to take
// where memory runs short (MADV_FREE).
//
// A block travels as a DLPack tensor of bytes, so that it comes back with the last tensor that shares its storage, on
// whichever thread. The place of what is kept is an atomic pointer: no lock that a fork or a dying thread could leave
// taken.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "checks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

struct Block {
  GrpoBytes tensor;
  int64_t bytes;     // asked for
  int64_t capacity;  // mapped, whole huge pages from tensor.data on
  int32_t kind;
  int32_t poisoned;  // whether it is filled with NaN when it comes back
};

constexpr int64_t kHugePage = 2 << 20;
inline int64_t whole_pages(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

std::atomic<Block*> kept[kBlockKinds] = {};
std::atomic<int64_t> kept_bytes{0}, used_bytes{0};

#if defined(__linux__)

// Address space that begins with a huge page; null where there is none.
inline char* reserve(int64_t capacity) {
  void* mapped = mmap(nullptr, capacity + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(mapped);
  const int64_t before = (kHugePage - int64_t(reinterpret_cast<uintptr_t>(start) % kHugePage)) % kHugePage;
  if (before > 0) munmap(start, before);
  munmap(start + before + capacity, kHugePage - before);
  return start + before;
}

inline void give_to_the_system(Block* block) {
  if (block == nullptr) return;
  munmap(block->tensor.data, block->capacity);
  free(block);
}

// To more memory, with the pages that it has.
inline bool grow(Block* block, int64_t capacity) {
  char* start = reserve(capacity);
  if (start == nullptr) return false;
  void* moved = mremap(block->tensor.data, block->capacity, capacity, MREMAP_MAYMOVE | MREMAP_FIXED, start);
  if (moved == MAP_FAILED) return false;  // what was reserved may be another thread's by now
  block->tensor.data = start;
  block->capacity = capacity;
  madvise(start, capacity, MADV_HUGEPAGE);
  return true;
}

// The kept block with room for `bytes`, at most twice that; null where none is kept.
inline Block* take_kept(int64_t bytes, int32_t kind) {
  Block* block = kept[kind].exchange(nullptr);
  if (block == nullptr) return nullptr;
  kept_bytes.fetch_sub(block->capacity);
  const int64_t capacity = whole_pages(bytes);
  if (block->capacity < capacity && !grow(block, capacity)) {
    give_to_the_system(block);
    return nullptr;
  }
  if (block->capacity > 2 * capacity) {
    munmap(static_cast<char*>(block->tensor.data) + capacity, block->capacity - capacity);
    block->capacity = capacity;
  }
  return block;
}

inline Block* fresh_block(int64_t bytes) {
  Block* block = static_cast<Block*>(calloc(1, sizeof(Block)));
  if (block == nullptr) return nullptr;
  block->capacity = whole_pages(bytes);
  block->tensor.data = reserve(block->capacity);
  if (block->tensor.data == nullptr) {
    free(block);
    return nullptr;
  }
  madvise(block->tensor.data, block->capacity, MADV_HUGEPAGE);
  return block;
}

inline void keep_block(Block* block) {
  madvise(block->tensor.data, block->capacity, MADV_FREE);
  kept_bytes.fetch_add(block->capacity);
  Block* other = kept[block->kind].exchange(block);
  if (other != nullptr) kept_bytes.fetch_sub(other->capacity);
  give_to_the_system(other);
}

// What a tensor's storage does at its end.
inline void give_back(GrpoBytes* tensor) {
  Block* block = static_cast<Block*>(tensor->context);
  used_bytes.fetch_sub(block->capacity);
  if (block->poisoned) memset(block->tensor.data, 0xff, block->bytes);  // NaN in every dtype
  keep_block(block);
}

inline int64_t drop_kept() {
  int64_t dropped = 0;
  for (std::atomic<Block*>& place : kept) {
    Block* block = place.exchange(nullptr);
    if (block == nullptr) continue;
    dropped += block->capacity;
    kept_bytes.fetch_sub(block->capacity);
    give_to_the_system(block);
  }
  return dropped;
}

inline GrpoBytes* new_block(int64_t bytes, int32_t kind, int32_t poisoned) {
  if (bytes == 0 || !is_count(bytes) || kind < 0 || kind >= kBlockKinds) return nullptr;
  Block* block = take_kept(bytes, kind);
  if (block == nullptr) block = fresh_block(bytes);
  if (block == nullptr && drop_kept() > 0) block = fresh_block(bytes);  // the other kind's had the room
  if (block == nullptr) return nullptr;
  used_bytes.fetch_add(block->capacity);
  block->bytes = bytes;
  block->kind = kind;
  block->poisoned = poisoned;
  GrpoBytes& tensor = block->tensor;
  tensor.device_type = 1;  // the CPU
  tensor.dimensions = 1;
  tensor.type_code = 1;  // unsigned integers
  tensor.type_bits = 8;
  tensor.type_lanes = 1;
  tensor.shape = &block->bytes;
  tensor.context = block;
  tensor.deleter = give_back;
  return &tensor;
}

#else

inline GrpoBytes* new_block(int64_t, int32_t, int32_t) { return nullptr; }
inline int64_t drop_kept() { return 0; }

#endif

}  // namespace
