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
template <class T>
GRPO_DEVICE void load_vector(const Piece<T>& piece, int vector, real_of<T> (&x)[kWidth<T>]) {
  const T* p = piece.start + vector * kWidth<T>;
  Words words;
  if (piece.aligned) {
    words = port::load_words(p);
  } else {
    T elements[kWidth<T>];
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) elements[i] = p[i];
    memcpy(&words, elements, sizeof(words));
  }
  unpack(words, p, x);
}
template <class T>
GRPO_DEVICE void store_vector(const Piece<T>& piece, int vector, const real_of<T> (&x)[kWidth<T>]) {
  T* p = piece.start + vector * kWidth<T>;
  const Words words = pack(x, p);
  if (piece.aligned) {
    port::store_words(p, words);
  } else {
    T elements[kWidth<T>];
    memcpy(elements, &words, sizeof(words));
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) p[i] = elements[i];
  }
}

template <class T>
GRPO_DEVICE double load_one(const T* p) {
  Words words{{0, 0, 0, 0}};
  memcpy(&words, p, sizeof(T));
  real_of<T> x[kWidth<T>];
  unpack(words, p, x);
  return x[0];
}

}  // namespace grpo
