// The two warps that move rows between global memory and the ring.
#pragma once

#include "job.h"

namespace grpo {

// By all lanes: a few elements that bulk copies do not take.
template <class T>
GRPO_DEVICE void copy_elements(T* to, const T* from, int bytes, int lane) {
  for (int i = lane; i * int(sizeof(T)) < bytes; i += 32) to[i] = from[i];
}

template <class T>
GRPO_DEVICE T* advanced(T* p, int bytes) {
  return p + bytes / int(sizeof(T));
}

// A tile of a row into its place, by whole vectors of 16 bytes: up to 15 bytes at either end are somebody else's, and
// nobody looks at them. The caller has yet to arrive at `filled`.
template <class T>
GRPO_DEVICE void load_tile(const Piece<T>& to, const T* from, port::Barrier& filled) {
  const intptr_t first = reinterpret_cast<intptr_t>(from) & ~intptr_t(15);
  const intptr_t end = (reinterpret_cast<intptr_t>(from + to.columns) + 15) & ~intptr_t(15);
  if (to.columns <= 0) return;
  void* place = reinterpret_cast<void*>(reinterpret_cast<intptr_t>(to.start) & ~intptr_t(15));
  filled.expect(int(end - first));
  port::bulk_load(place, reinterpret_cast<const void*>(first), int(end - first), filled);
}

// The block's slice of its cluster's dead rows.
template <class T, Mode kMode>
GRPO_DEVICE void store_zeros(const Job<T, kMode>& job, Shared& shared, int lane) {
  const int dead = int(job.p.rows) - job.live_rows;
  for (int i = job.first_row; i < dead; i += job.p.clusters) {
    T* out = job.out_slice(job.p.order[job.p.rows - 1 - i]);
    const Edges edges(out, job.columns * int(sizeof(T)));
    const T* zeros = reinterpret_cast<const T*>(shared.zeros);
    copy_elements(out, zeros, edges.head, lane);
    copy_elements(advanced(out, edges.head + edges.body), zeros, edges.tail, lane);
    for (int done = 0; lane == 0 && done < edges.body; done += kZeroBytes) {
      const int bytes = edges.body - done < kZeroBytes ? edges.body - done : kZeroBytes;
      port::bulk_store(advanced(out, edges.head + done), zeros, bytes);
    }
  }
  if (lane == 0) {
    port::bulk_commit();
    port::bulk_wait_read<0>();
  }
}

// Fills the ring with the cluster's live rows, one after the other, as far ahead as there is room.
template <class T, Mode kMode>
GRPO_DEVICE void load_rows(const Job<T, kMode>& job, Shared& shared) {
  const int lane = port::thread_index() % 32, count = job.count();
  Cursor cursor;
  for (int first = 0; first < count; first += 32) {
    // Which row, which id, which logit are three reads one after the other: for 32 rows at once, a lane each.
    RowInfo mine{};
    PairInfo pair{};
    if (first + lane < count) {
      const int row = job.row_of(first + lane);
      mine = job.info_of(row);
      if constexpr (job.kPair) pair = job.pair_info_of(row);
    }
    for (int k = 0; k < 32 && first + k < count; ++k) {
      const int row = port::shuffle(mine.row, k);
      const T *slice = job.slice(row), *teacher = job.kPair ? job.teacher_slice(row) : nullptr;
      for (int tile = 0; tile < job.tiles; ++tile) {
        shared.emptied[cursor.place].wait(cursor.lap ^ 1);
        if (lane == k) {
          const int place = cursor.place, column = tile * kTileColumns<T>;
          port::Barrier& filled = shared.filled[place];
          if (tile == 0) shared.info[place] = mine;
          load_tile(job.piece(shared, place, slice, tile, kElsewhere), slice + column, filled);
          if constexpr (job.kPair) {
            if (tile == 0) shared.pairs[place] = pair;
            load_tile(job.teacher_piece(shared, place, teacher, tile, kElsewhere), teacher + column, filled);
          }
          filled.arrive();
        }
        cursor.next(job.p.tiles);
      }
    }
  }
  if (job.kGradient) store_zeros(job, shared, lane);
}

// A tile of gradients to its row, which begins as far from 16 bytes as its place in the ring.
template <class T>
GRPO_DEVICE void store_tile(T* to, const Piece<T>& piece, int lane) {
  const T* from = piece.start;
  const int bytes = piece.columns * int(sizeof(T));
  const Edges edges(to, bytes);
  const int after = edges.head + edges.body;
  if (lane == 0 && edges.body > 0) port::bulk_store(advanced(to, edges.head), advanced(from, edges.head), edges.body);
  copy_elements(to, from, edges.head, lane);
  copy_elements(advanced(to, after), advanced(from, after), edges.tail, lane);
}

// Stores each tile of gradients and gives its place back as soon as it has been read; at a row's end all of them, so
// that the row after the next has its room.
template <class T, Mode kMode>
GRPO_DEVICE void store_rows(const Job<T, kMode>& job, Shared& shared) {
  const int lane = port::thread_index() % 32, count = job.count(), tiles = job.p.tiles;
  Cursor cursor, oldest;
  for (int index = 0; index < count; ++index) {
    T* out = nullptr;
    const T* slice = nullptr;
    for (int tile = 0, released = 0; tile < job.tiles; ++tile, cursor.next(tiles)) {
      shared.written[cursor.place].wait(cursor.lap);
      if (tile == 0) {
        const int row = shared.info[cursor.place].row;
        out = job.out_slice(row);
        slice = job.slice(row);
      }
      store_tile(out + tile * kTileColumns<T>, job.piece(shared, cursor.place, slice, tile, kElsewhere), lane);
      port::sync_warp();
      if (lane != 0) continue;
      port::bulk_commit();
      const bool last = tile + 1 == job.tiles;
      if (last) {
        port::bulk_wait_read<0>();
      } else {
        port::bulk_wait_read<kStoresInFlight>();
      }
      for (; released <= tile - (last ? 0 : kStoresInFlight); ++released, oldest.next(tiles))
        shared.emptied[oldest.place].arrive();
    }
  }
}

}  // namespace grpo
