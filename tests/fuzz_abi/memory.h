// What a fuzzed call is made of: numbers out of an input's bytes, and buffers of exactly their size.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define GRPO_FUZZ_SANITIZED 1
#elif defined(__has_feature)  // by Clang, and GCC from 14 on, with a sanitizer or without
#if __has_feature(address_sanitizer)
#define GRPO_FUZZ_SANITIZED 1
#endif
#endif

// An input's bytes, one number after the other; past its end what follows from its length and its last byte alone, so
// that a short input is a whole call, and a changed byte changes little else.
class Input {
 public:
  Input(const uint8_t* data, size_t size)
      : data_(data), size_(size), state_(size * 256 + (size ? data[size - 1] : 0)) {}
  uint8_t byte() {
    if (at_ < size_) return data_[at_++];
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint8_t(state_ >> 56);
  }
  int64_t below(int64_t n) { return byte() % n; }
  bool one_in(int n) { return byte() % n == n - 1; }
  uint64_t word() {
    uint64_t out = 0;
    for (int i = 0; i < 8; ++i) out = out << 8 | byte();
    return out;
  }
  // A number that is none of a size.
  int64_t hostile() {
    constexpr int64_t kMost = int64_t(1) << 47;
    const int64_t numbers[] = {0, -1, INT64_MIN, INT64_MAX, kMost, kMost + 1, int64_t(word())};
    return numbers[below(7)];
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
  uint64_t state_;
};

// Buffers that end where a page does that nobody may touch, or begin there; under AddressSanitizer plain ones.
class Arena {
 public:
  ~Arena() {
    for (const Piece& piece : pieces_) release(piece);
  }
  void* get(size_t bytes, bool at_the_end = true) {
    const Piece piece = take(bytes, at_the_end);
    pieces_.push_back(piece);
    return piece.data;
  }
  // Of all buffers but some, one after the other.
  std::vector<char> contents(const std::vector<const void*>& without) const {
    std::vector<char> out;
    for (const Piece& piece : pieces_) {
      const char* data = static_cast<const char*>(piece.data);
      if (std::find(without.begin(), without.end(), piece.data) == without.end())
        out.insert(out.end(), data, data + piece.bytes);
    }
    return out;
  }

 private:
  struct Piece {
    void* data;
    size_t bytes;
    void* mapped;
    size_t size;
  };
#ifdef GRPO_FUZZ_SANITIZED
  static Piece take(size_t bytes, bool) {
    void* data = malloc(bytes);
    return {data, bytes, data, bytes};
  }
  static void release(const Piece& piece) { free(piece.mapped); }
#else
  static constexpr size_t kPage = 4096;
  static Piece take(size_t bytes, bool at_the_end) {
    const size_t room = (bytes + kPage - 1) / kPage * kPage, size = room + 2 * kPage;
    char* mapped = static_cast<char*>(mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapped == MAP_FAILED) abort();
    if (room && mprotect(mapped + kPage, room, PROT_READ | PROT_WRITE)) abort();
    return {at_the_end ? mapped + kPage + room - bytes : mapped + kPage, bytes, mapped, size};
  }
  static void release(const Piece& piece) { munmap(piece.mapped, piece.size); }
#endif
  std::vector<Piece> pieces_;
};
