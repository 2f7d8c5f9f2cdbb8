// 16 bytes of logits at a time, between shared memory and registers.
#pragma once

#include <string.h>

#include "../common/elements.h"
#include "port.h"

namespace grpo {

template <class T>
struct Arithmetic {
  using real = float;
};
template <>
struct Arithmetic<double> {
  using real = double;
};
template <class T>
using real_of = typename Arithmetic<T>::real;

using port::Words;

template <class T>
constexpr int kWidth = 16 / int(sizeof(T));

GRPO_DEVICE void unpack(const Words& words, const BFloat16*, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = port::float_of(words.word[i] << 16);
    x[2 * i + 1] = port::float_of(words.word[i] & 0xffff0000u);
  }
}
GRPO_DEVICE void unpack(const Words& words, const Float16*, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) port::float16_unpair(words.word[i], x[2 * i], x[2 * i + 1]);
}
GRPO_DEVICE void unpack(const Words& words, const float*, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = port::float_of(words.word[i]);
}
GRPO_DEVICE void unpack(const Words& words, const double*, double (&x)[2]) { memcpy(x, &words, sizeof(words)); }

GRPO_DEVICE Words pack(const float (&x)[8], const BFloat16*) {
  return {{port::bfloat16_pair(x[0], x[1]), port::bfloat16_pair(x[2], x[3]), port::bfloat16_pair(x[4], x[5]),
           port::bfloat16_pair(x[6], x[7])}};
}
GRPO_DEVICE Words pack(const float (&x)[8], const Float16*) {
  return {{port::float16_pair(x[0], x[1]), port::float16_pair(x[2], x[3]), port::float16_pair(x[4], x[5]),
           port::float16_pair(x[6], x[7])}};
}
GRPO_DEVICE Words pack(const float (&x)[4], const float*) {
  return {{port::bits_of(x[0]), port::bits_of(x[1]), port::bits_of(x[2]), port::bits_of(x[3])}};
}
GRPO_DEVICE Words pack(const double (&x)[2], const double*) {
  Words words;
  memcpy(&words, x, sizeof(words));
  return words;
}

// A tile's part of a row, in shared memory. Vector v begins at column v * width.
template <class T>
struct Piece {
  T* start;
  int columns;
  int target;  // the sampled column, if it is here
  int skew;    // bytes between a multiple of 16 and the start
};

// A vector's columns, where it begins so many words, and then some bytes, after a multiple of 16: out of two vectors.
template <int kSkewWords, class T>
GRPO_DEVICE Words load_across(const Piece<T>& piece, int vector) {
  const unsigned char* first = reinterpret_cast<const unsigned char*>(piece.start + vector * kWidth<T>) - piece.skew;
  const Words low = port::load_words(first), high = port::load_words(first + 16);
  const uint32_t words[8] = {low.word[0],  low.word[1],  low.word[2],  low.word[3],
                             high.word[0], high.word[1], high.word[2], high.word[3]};
  Words whole;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    whole.word[i] = port::shifted(words[kSkewWords + i], words[kSkewWords + i + 1], piece.skew % 4 * 8);
  return whole;
}

// Calls run(load), where load(vector) gives a vector's columns: what is the same for all of them is decided once.
template <class T, class Run>
GRPO_DEVICE void with_loads(const Piece<T>& piece, Run run) {
  if (piece.skew == 0) return run([&](int v) { return port::load_words(piece.start + v * kWidth<T>); });
  switch (piece.skew / 4) {
    case 0: return run([&](int v) { return load_across<0>(piece, v); });
    case 1: return run([&](int v) { return load_across<1>(piece, v); });
    case 2: return run([&](int v) { return load_across<2>(piece, v); });
    default: return run([&](int v) { return load_across<3>(piece, v); });
  }
}

// A vector of columns from any one on: it may begin before the first and end after the last, where it holds anything.
template <class T>
GRPO_DEVICE Words load_from(const Piece<T>& piece, int column) {
  const auto* start = reinterpret_cast<const unsigned char*>(piece.start);  // kept a pointer into shared memory
  const int first = column * int(sizeof(T)), bytes = piece.columns * int(sizeof(T)), skew = (first + piece.skew) & 15;
  const auto loaded = [=](int at) { return at < bytes && at + 16 > 0 ? port::load_words(start + at) : Words{}; };
  const Words low = loaded(first - skew);
  if (skew == 0) return low;
  const Words high = loaded(first - skew + 16);
  uint32_t words[8] = {low.word[0],  low.word[1],  low.word[2],  low.word[3],
                       high.word[0], high.word[1], high.word[2], high.word[3]};
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = skew & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = skew & 4 ? words[i + 1] : words[i];
  Words found;
#pragma unroll
  for (int i = 0; i < 4; ++i) found.word[i] = port::shifted(words[i], words[i + 1], skew % 4 * 8);
  return found;
}

template <class T>
GRPO_DEVICE double load_one(const T* p) {
  const T one = *p;
  Words words{{0, 0, 0, 0}};
  memcpy(&words, &one, sizeof(T));
  real_of<T> x[kWidth<T>];
  unpack(words, p, x);
  return x[0];
}

}  // namespace grpo
