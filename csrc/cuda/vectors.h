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
  int target;    // the sampled column, if it is here
  bool aligned;  // to 16 bytes, not to an element alone
};

template <class T>
GRPO_DEVICE void load_plain(const Piece<T>& piece, int vector, real_of<T> (&x)[kWidth<T>]) {
  const T* p = piece.start + vector * kWidth<T>;
  unpack(port::load_words(p), p, x);
}
// Otherwise a vector lies in two of 16 bytes, whose other columns may change meanwhile.
template <class T>
GRPO_DEVICE void load_vector(const Piece<T>& piece, int vector, real_of<T> (&x)[kWidth<T>]) {
  const T* p = piece.start + vector * kWidth<T>;
  if (piece.aligned) return unpack(port::load_words(p), p, x);
  const int skew = int(reinterpret_cast<intptr_t>(p) & 15);
  const unsigned char* first = reinterpret_cast<const unsigned char*>(p) - skew;
  const Words low = port::load_words(first), high = port::load_words(first + 16);
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = low.word[i];
    words[i + 4] = high.word[i];
  }
#pragma unroll
  for (int step = 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i + step < 8; ++i) words[i] = skew / 4 & step ? words[i + step] : words[i];
  }
  Words whole;
#pragma unroll
  for (int i = 0; i < 4; ++i) whole.word[i] = port::shifted(words[i], words[i + 1], skew % 4 * 8);
  unpack(whole, p, x);
}
template <class T>
GRPO_DEVICE void store_vector(const Piece<T>& piece, int vector, const real_of<T> (&x)[kWidth<T>]) {
  T* p = piece.start + vector * kWidth<T>;
  const Words words = pack(x, p);
  if (piece.aligned) return port::store_words(p, words);
  T elements[kWidth<T>];
  memcpy(elements, &words, sizeof(words));
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) p[i] = elements[i];
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
