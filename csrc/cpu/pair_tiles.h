// Walks a policy's row beside its teacher's.
//
// A row is walked in tiles of kTile columns. A tile has the values and the powers of both rows in the lanes' order of
// the policy's type, whatever the teacher's: the loops over columns are made once for each divergence, not for each
// pair of types. A column's powers have the bits of the first sweep (row.h), which may have kept them.
#pragma once

#include "row.h"

#define GRPO_NOINLINE __attribute__((noinline))

namespace {

constexpr int64_t kTile = 1024;
static_assert(kSegment % kTile == 0, "a tile has one largest value");

// One row of a pair, its statistics as log_probs writes them.
template <class V>
struct PairRow {
  using scalar = typename V::scalar;
  const void* logits;
  int32_t dtype;
  LogitMap<V> map;
  scalar anchor = 0, log_sum = 0;
  const scalar* largest = nullptr;  // that the segments' powers are relative to; null: the anchor
  const scalar* exps = nullptr;     // that were kept, whole blocks; null: they are computed
};

// Calls body with the logits from a column on, as what they are.
template <class Body>
GRPO_INLINE void with_logits(const PairRow<Float>& row, int64_t column, Body&& body) {
  switch (row.dtype) {
    case kFloat32: return body(static_cast<const float*>(row.logits) + column);
    case kBFloat16: return body(static_cast<const BFloat16*>(row.logits) + column);
    default: return body(static_cast<const Float16*>(row.logits) + column);
  }
}
template <class Body>
GRPO_INLINE void with_logits(const PairRow<Double>& row, int64_t column, Body&& body) {
  body(static_cast<const double*>(row.logits) + column);
}

// The columns of a tile, whole blocks: past the row's end values are -inf and powers 0.
template <class V>
struct Tile {
  using scalar = typename V::scalar;
  int64_t start, columns;
  const scalar *policy, *teacher;                  // values,
  const BFloat16 *policy_logits, *teacher_logits;  // or the logits that they are, where both rows are bfloat16
  const scalar *policy_exps, *teacher_exps;        // powers of two,
  scalar policy_factor, teacher_factor;            // and what makes them probabilities
  scalar *p, *relative;                            // what the gradient is made of, which may lie over the powers

  int64_t whole() const { return (columns + 2 * V::lanes - 1) / (2 * V::lanes) * (2 * V::lanes); }
};

// Where the parts of a tile are made that do not lie in memory as they are needed.
template <class V>
struct TileRoom {
  alignas(64) typename V::scalar policy[kTile], teacher[kTile], policy_exps[kTile], teacher_exps[kTile];
};

// p_j and own_j + p_j * (slope_j - slope at centre) of a row's columns.
template <class V>
struct PairParts {
  typename V::scalar *p = nullptr, *relative = nullptr;
};

template <class V, bool kSoftcap>
GRPO_NOINLINE void tile_values(const PairRow<V>& row, int64_t start, int64_t columns, typename V::scalar* values) {
  with_logits(row, start, [&](const auto* logits) GRPO_LAMBDA {
    for_blocks<V>(logits, columns, [&](const auto* p, int64_t offset, int64_t count) GRPO_LAMBDA {
      V first, second;
      load_block<V, kSoftcap>(p, count, row.map, first, second);
      first.store(values + offset);
      second.store(values + offset + V::lanes);
    });
  });
}

// d value / d logit under a softcap.
template <class V>
GRPO_NOINLINE void tile_cap_slopes(const PairRow<V>& row, int64_t start, int64_t columns, typename V::scalar* slopes) {
  const V inner = V::broadcast(row.map.inner), scale = V::broadcast(row.map.inner * row.map.cap);
  with_logits(row, start, [&](const auto* logits) GRPO_LAMBDA {
    for_blocks<V>(logits, columns, [&](const auto* p, int64_t offset, int64_t) GRPO_LAMBDA {
      V value[2], tanh, derivative;
      load_pair(p, value[0], value[1]);
      for (int i = 0; i < 2; ++i) {
        tanh_of(value[i] * inner, tanh, derivative);
        (derivative * scale).store(slopes + offset + i * V::lanes);
      }
    });
  });
}

// As the first sweep has them: relative to one of the row's values.
template <class V>
GRPO_NOINLINE void tile_exps(const typename V::scalar* values, int64_t whole, typename V::scalar largest,
                             typename V::scalar slope, typename V::scalar* exps) {
  const V shift = V::broadcast(largest > -INFINITY ? largest : 0), factor = V::broadcast(slope);
  for (int64_t i = 0; i < whole; i += V::lanes)
    exp2_of_clamped(clamp_power((V::load(values + i) - shift) * factor)).store(exps + i);
}

// Between the order of memory and bfloat16's lanes.
template <class scalar>
GRPO_NOINLINE void reorder(scalar* tile, int64_t whole, bool to_lanes) {
  constexpr int64_t block = 32;
  for (int64_t start = 0; start < whole; start += block) {
    scalar copy[block];
    memcpy(copy, tile + start, sizeof(copy));
    for (int64_t i = 0; i < block; ++i) {
      const int64_t lane = lane_in_pair(i, static_cast<const BFloat16*>(nullptr));
      tile[start + (to_lanes ? lane : i)] = copy[to_lanes ? i : lane];
    }
  }
}

template <class V>
inline typename V::scalar segment_factor(const PairRow<V>& row, int64_t start) {
  const double whole = ::exp(-double(row.log_sum));
  const double largest = row.largest ? row.largest[start / kSegment] : row.anchor;
  if (largest == row.anchor) return typename V::scalar(whole);
  return typename V::scalar(whole * ::exp2((largest - row.anchor) * row.map.slope));
}

// One row's part of a tile; `split`: it is wanted in bfloat16's order.
template <class V>
inline void load_row(const PairRow<V>& row, const Tile<V>& tile, bool split, typename V::scalar* value_room,
                     typename V::scalar* exp_room, const typename V::scalar*& values, const typename V::scalar*& exps) {
  using scalar = typename V::scalar;
  const int64_t whole = tile.whole();
  const bool plain = row.dtype == kFloat32 || row.dtype == kFloat64;
  const bool other_order = split != (row.dtype == kBFloat16);
  values = value_room;
  if (row.map.softcap) {
    tile_values<V, true>(row, tile.start, tile.columns, value_room);
  } else if (plain && !other_order && whole == tile.columns) {
    values = static_cast<const scalar*>(row.logits) + tile.start;
  } else {
    tile_values<V, false>(row, tile.start, tile.columns, value_room);
  }
  if (row.exps && !other_order) {
    exps = row.exps + tile.start;
  } else {
    exps = exp_room;
    const scalar largest = row.largest ? row.largest[tile.start / kSegment] : row.anchor;
    tile_exps<V>(values, whole, largest, row.map.slope, exp_room);
  }
  if (other_order) {
    reorder(value_room, whole, split);
    reorder(exp_room, whole, split);
  }
}

// Whether a row's logits are as good as values in a tile: they are one addition away.
template <class V>
inline bool halves(const PairRow<V>& row) {
  return row.dtype == kBFloat16 && !row.map.softcap && row.exps;
}

// Calls body with the tiles of columns [from, to), the first one first. `parts`: where whole rows of p and `relative`
// go; null: they are the body's until the next tile.
template <class V, class Body>
inline void for_tiles(const PairRow<V>& policy, const PairRow<V>& teacher, int64_t from, int64_t to,
                      const PairParts<V>& parts, Body&& body) {
  TileRoom<V> room;
  const bool split = policy.dtype == kBFloat16, of_halves = halves(policy) && halves(teacher);
  Tile<V> tile;
  for (int64_t start = from; start < to; start += kTile) {
    tile.start = start;
    tile.columns = to - start < kTile ? to - start : kTile;
    if (start == from || start % kSegment == 0) {
      tile.policy_factor = segment_factor(policy, start);
      tile.teacher_factor = segment_factor(teacher, start);
    }
    if (of_halves && tile.whole() == tile.columns) {
      tile.policy_logits = static_cast<const BFloat16*>(policy.logits) + start;
      tile.teacher_logits = static_cast<const BFloat16*>(teacher.logits) + start;
      tile.policy_exps = policy.exps + start;
      tile.teacher_exps = teacher.exps + start;
    } else {
      tile.policy_logits = tile.teacher_logits = nullptr;
      load_row(policy, tile, split, room.policy, room.policy_exps, tile.policy, tile.policy_exps);
      load_row(teacher, tile, split, room.teacher, room.teacher_exps, tile.teacher, tile.teacher_exps);
    }
    tile.p = parts.p ? parts.p + start : room.policy_exps;
    tile.relative = parts.relative ? parts.relative + start : room.teacher_exps;
    body(tile);
  }
}

// The same with the parts of whole rows alone, the last tile first: it is still in the nearest cache.
template <class V, class Body>
inline void for_parts(const PairParts<V>& parts, int64_t vocab, Body&& body) {
  Tile<V> tile;
  for (int64_t start = (vocab - 1) / kTile * kTile; start >= 0; start -= kTile) {
    tile.start = start;
    tile.columns = vocab - start < kTile ? vocab - start : kTile;
    tile.p = parts.p + start;
    tile.relative = parts.relative + start;
    body(tile);
  }
}

}  // namespace
