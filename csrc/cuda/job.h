// A block's part of a call: which rows, which columns, and where they are.
#pragma once

#include "../common/terms.h"
#include "divergence.h"

namespace grpo {

enum Mode { kLogProbs, kLogProbsBackward, kFusedLoss, kDivergence, kDivergenceBackward, kFusedDivergence };

template <class T, Mode kMode>
struct Job {
  using real = real_of<T>;
  static constexpr bool kFused = kMode == kFusedLoss || kMode == kFusedDivergence;  // blocks exchange what they find
  static constexpr bool kBackward = kMode == kLogProbsBackward || kMode == kDivergenceBackward;
  static constexpr bool kGradient = kFused || kBackward;
  static constexpr bool kPair = kMode >= kDivergence;  // the teacher's row beside the policy's
  static constexpr int kRows = kPair ? 2 : 1;

  const GrpoCudaParams& p;
  LogitMap<real> map, teacher_map;  // of the call's temperatures
  int rank, first_row, live_rows;   // the block's slice; the place of its first row in the order of rows
  int64_t first_column;
  int columns, tiles;  // of the slice, which has at least one tile
  bool ahead;          // two rows fit: one is summed before the gradient of the one before it

  GRPO_DEVICE explicit Job(const GrpoCudaParams& params)
      : p(params), map(logit_map(static_cast<const real*>(params.numbers))) {
    if constexpr (kPair) teacher_map = logit_map(static_cast<const real*>(params.teacher_numbers));
    rank = port::block_index() % p.cluster;
    first_row = port::block_index() / p.cluster;
    live_rows = p.order[p.rows];
    const int64_t whole = slice_columns(p.vocab, p.cluster, sizeof(T));
    first_column = rank * whole < p.vocab ? rank * whole : p.vocab;
    columns = int(p.vocab - first_column < whole ? p.vocab - first_column : whole);
    tiles = (columns * int(sizeof(T)) + kTileBytes - 1) / kTileBytes;
    tiles = tiles > 0 ? tiles : 1;
    ahead = 2 * slice_tiles(p.vocab, p.cluster, sizeof(T)) <= p.tiles;
  }

  // Live rows that this block's cluster takes.
  GRPO_DEVICE int count() const { return first_row < live_rows ? (live_rows - first_row - 1) / p.clusters + 1 : 0; }
  GRPO_DEVICE int row_of(int index) const { return p.order[first_row + index * p.clusters]; }

  GRPO_DEVICE static real at(const void* values, int row) { return static_cast<const real*>(values)[row]; }

  GRPO_DEVICE const T* row(int r) const {
    const int length = int(p.length);
    return static_cast<const T*>(p.logits) + r / length * p.batch_stride + r % length * p.row_stride;
  }
  GRPO_DEVICE T* out_row(int r) const {
    const int length = int(p.length);
    return static_cast<T*>(p.out) + r / length * p.out_batch_stride + r % length * p.out_row_stride;
  }
  GRPO_DEVICE const T* teacher_row(int r) const {
    const int length = int(p.length);
    const T* first = static_cast<const T*>(p.teacher_logits);
    return first + r / length * p.teacher_batch_stride + r % length * p.teacher_row_stride;
  }
  GRPO_DEVICE const T* slice(int r) const { return row(r) + first_column; }
  GRPO_DEVICE const T* teacher_slice(int r) const { return teacher_row(r) + first_column; }
  GRPO_DEVICE T* out_slice(int r) const { return out_row(r) + first_column; }

  GRPO_DEVICE int tile_columns(int tile) const {
    const int left = columns - tile * kTileColumns<T>;
    return left < kTileColumns<T> ? left : kTileColumns<T>;
  }
  // A tile of a row's slice in its place of the ring: its first column is as far from 16 bytes as in global memory.
  GRPO_DEVICE Piece<T> piece(Shared& shared, int place, const T* slice, int tile, int target) const {
    return piece_at(tile_at(shared, place * kRows), slice, tile, target);
  }
  GRPO_DEVICE Piece<T> teacher_piece(Shared& shared, int place, const T* slice, int tile, int target) const {
    return piece_at(tile_at(shared, place * kRows + 1), slice, tile, target);
  }
  GRPO_DEVICE Piece<T> piece_at(unsigned char* place, const T* slice, int tile, int target) const {
    const int skew = int(reinterpret_cast<intptr_t>(slice) & 15);
    T* start = reinterpret_cast<T*>(place + skew);
    return {start, tile_columns(tile), target - tile * kTileColumns<T>, skew};
  }

  // The sampled column's logit; NaN for an id outside the vocabulary.
  GRPO_DEVICE double sampled_logit(int r) const { return sampled(r, row(r)); }
  GRPO_DEVICE double sampled(int r, const T* logits) const {
    const int64_t id = p.token_ids[r];
    return id >= 0 && id < p.vocab ? load_one(logits + id) : NAN;
  }
  // By the row's own temperature, if it has one.
  GRPO_DEVICE LogitMap<real> map_of(int r) const {
    return p.temperature ? logit_map(static_cast<const real*>(p.numbers), at(p.temperature, r)) : map;
  }
  GRPO_DEVICE LogitMap<real> teacher_map_of(int r) const {
    return p.teacher_temperature ? logit_map(static_cast<const real*>(p.teacher_numbers), at(p.teacher_temperature, r))
                                 : teacher_map;
  }
  template <class Info>
  GRPO_DEVICE static LogitMap<real> map_of(const LogitMap<real>& map, const Info& info) {
    LogitMap<real> own = map;
    own.slope = real(info.slope);
    own.derivative = info.derivative;
    return own;
  }
  GRPO_DEVICE LogitMap<real> map_of(const RowInfo& info) const { return map_of(map, info); }
  GRPO_DEVICE PairMap<real> pair_map(const LogitMap<real>& policy, const LogitMap<real>& teacher) const {
    return {policy, teacher, real(policy.derivative), at(p.numbers, kDivergenceMix), p.divergence_kind};
  }
  GRPO_DEVICE PairMap<real> map_of(const RowInfo& info, const PairInfo& pair) const {
    return pair_map(map_of(info), map_of(teacher_map, pair));
  }
  // Of statistics that an earlier call wrote.
  GRPO_DEVICE Odds<real> known_odds(int r, const PairMap<real>& maps) const {
    return odds_of<real>(at(p.anchor, r), at(p.log_sum, r), at(p.teacher_anchor, r), at(p.teacher_log_sum, r),
                         maps.policy.derivative, maps.teacher.derivative);
  }
  GRPO_DEVICE double value_of(double logit) const { return value_of(logit, map); }
  GRPO_DEVICE static double value_of(double logit, const LogitMap<real>& map) {
    return map.softcap ? softcapped(real(logit), map) : real(logit);
  }

  GRPO_DEVICE RowInfo info_of(int r) const {
    RowInfo info;
    const int64_t id = int64_t(uint64_t(p.token_ids[r]) - uint64_t(first_column));  // any number may be there
    const bool here = id >= 0 && id < columns;
    info.row = r;
    info.target = here ? int(id) : kElsewhere;
    // In a backward the blocks of a row do not wait for each other: another may have overwritten it, in place.
    const bool needed = kMode != kDivergence && (!kBackward || (here && map.softcap));
    info.logit = needed ? sampled_logit(r) : 0;
    info.value = value_of(info.logit);
    const LogitMap<real> own = map_of(r);
    info.slope = own.slope;
    info.derivative = own.derivative;
    if (kBackward) {
      const double g = p.grad_log_prob ? at(p.grad_log_prob, r) : 0, h = p.grad_entropy ? at(p.grad_entropy, r) : 0;
      const GradientTerms<real> terms = row_gradient<real>(at(p.log_prob, r), at(p.entropy, r), at(p.anchor, r),
                                                           at(p.log_sum, r), g, h, info.logit, own);
      keep_terms(info.terms, terms);
    }
    return info;
  }

  GRPO_DEVICE PairInfo pair_info_of(int r) const {
    PairInfo info{};
    const LogitMap<real> teacher = teacher_map_of(r);
    info.slope = teacher.slope;
    info.derivative = teacher.derivative;
    if (kFused) {
      info.value = value_of(sampled(r, teacher_row(r)), teacher_map);
      return info;
    }
    const PairMap<real> maps = pair_map(map_of(r), teacher);
    Odds<real> odds = known_odds(r, maps);
    if (kBackward) {
      const Divergence<real> known{0, at(p.shift, r), at(p.centre, r), at(p.mean, r)};
      odds.shift = known.shift;
      keep_slopes(info.slopes, divergence_slopes(known, at(p.grad_divergence, r), maps));
    }
    keep_odds(info.odds, odds);
    return info;
  }
};

}  // namespace grpo
