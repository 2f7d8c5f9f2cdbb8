// Where a row lies while a cluster works on it: slices over the blocks, tiles in each block's ring.
#pragma once

#include "../common/stats.h"
#include "api.h"
#include "port.h"

namespace grpo {

constexpr int kConsumerWarps = 8, kConsumers = 32 * kConsumerWarps;  // they compute
constexpr int kRowsAhead = 2;  // rows that a block may be between the sums of one and the gradient of another
constexpr int kSettlers = kRowsAhead;
constexpr int kLoader = kConsumerWarps, kStorer = kLoader + 1, kSettler = kLoader + 2;  // first warps of the others
constexpr int kThreads = 32 * (kSettler + kSettlers);

constexpr int kTileBytes = 16384;
constexpr int kTilePitch = kTileBytes + 16;  // a tile begins at its place in global memory, modulo 16 bytes
constexpr int kVectorsPerThread = kTileBytes / 16 / kConsumers;
template <class T>
constexpr int kTileColumns = kTileBytes / int(sizeof(T));
constexpr int kMaxTiles = 16;
constexpr int kMaxCluster = 16;
constexpr int kZeroBytes = 4096;
constexpr int kStoresInFlight = 2;

// Sums of 2^((value_j - reference) * slope), and of these times the power, over some columns but the sampled one.
template <class real>
struct alignas(16) Partial {
  real reference, sum, weighted, unused;
};

constexpr int kElsewhere = -kTileBytes;

// Numbers of GradientTerms, Odds and DivergenceSlopes (gradient.h, divergence.h).
constexpr int kTerms = 5, kOdds = 7, kSlopes = 4;

struct RowInfo {
  int row;
  int target;    // sampled column, counted from the slice's first, or kElsewhere
  double logit;  // of the sampled column; NaN for an id outside the vocabulary
  double value;  // the same, softcapped
  double slope;  // of the row's LogitMap, as its derivative
  double derivative;
  double terms[kTerms];  // GradientTerms: known before the row is read, or a settler's
};

// Of a row's teacher, and of the pair.
struct PairInfo {
  double value;  // of the sampled column
  double slope, derivative;
  double odds[kOdds];
  double slopes[kSlopes];
};

constexpr int kMessageBytes = 96;  // what a warp or a slice has to say of a row: Partial, PartialPair, DivergenceSums

struct alignas(128) Shared {
  unsigned char zeros[kZeroBytes];
  RowInfo info[kMaxTiles];  // of the row whose first tile is in that place
  PairInfo pairs[kMaxTiles];
  alignas(16) unsigned char warps[kRowsAhead][kConsumerWarps * kMessageBytes];
  alignas(16) unsigned char slices[kRowsAhead][kMaxCluster * kMessageBytes];
  double numbers[kNumbers];           // of the call; room for either precision
  port::Barrier filled[kMaxTiles];    // a tile has been loaded
  port::Barrier written[kMaxTiles];   // it holds gradients
  port::Barrier emptied[kMaxTiles];   // it may be loaded again
  port::Barrier swept[kRowsAhead];    // what this block's slice has to say is there
  port::Barrier arrived[kRowsAhead];  // so it is of all blocks
  port::Barrier drained[kRowsAhead];  // all blocks have read this one's
  port::Barrier settled[kRowsAhead];  // what follows from it is in the row's info
  // Followed by the ring.
};

// A place of the ring holds a tile of the row, or of a pair of rows a tile of each.
constexpr int kTilesOffset = int(sizeof(Shared));
inline int shared_bytes(int places, int rows) { return kTilesOffset + places * rows * kTilePitch; }

GRPO_DEVICE unsigned char* tile_at(Shared& shared, int tile) {
  return reinterpret_cast<unsigned char*>(&shared) + kTilesOffset + tile * kTilePitch;
}

template <class Message>
GRPO_DEVICE Message* messages(unsigned char* slots) {
  static_assert(sizeof(Message) <= kMessageBytes, "a message has more bytes than its slot");
  return reinterpret_cast<Message*>(slots);
}

// The ring, tile by tile: all roles walk it in the same order.
struct Cursor {
  int place = 0;
  unsigned lap = 0;

  GRPO_DEVICE void next(int tiles, int steps = 1) {
    for (place += steps; place >= tiles; place -= tiles) lap ^= 1;
  }
};

// A slice is a whole number of 16-byte vectors, but for the last one with columns.
GRPO_FN int64_t slice_columns(int64_t vocab, int cluster, int element_bytes) {
  const int64_t width = 16 / element_bytes, vectors = (vocab + width - 1) / width;
  return (vectors + cluster - 1) / cluster * width;
}
GRPO_FN int slice_tiles(int64_t vocab, int cluster, int element_bytes) {
  const int64_t bytes = slice_columns(vocab, cluster, element_bytes) * element_bytes;
  return int((bytes + kTileBytes - 1) / kTileBytes);
}

// The smallest cluster whose blocks hold two rows, or two pairs of rows, so that one is summed while the other waits
// for its slopes; or the largest that holds one. A larger one is not worth a quarter of the multiprocessors, which
// clusters of 16 may leave idle.
inline GrpoCudaPlan plan_of(const GrpoCudaDevice& device, int element_bytes, int64_t vocab, int rows) {
  GrpoCudaPlan plan{0, 0, (device.shared_bytes - kTilesOffset) / (rows * kTilePitch)};
  plan.tiles = plan.tiles < kMaxTiles ? plan.tiles : kMaxTiles;
  for (int i = 0; i < 5; ++i) {
    const int cluster = 1 << i, clusters = device.clusters[i];
    if (clusters == 0 || slice_tiles(vocab, cluster, element_bytes) > plan.tiles) continue;
    if (4 * cluster * clusters < 3 * plan.cluster * plan.clusters) continue;
    plan.cluster = cluster;
    plan.clusters = clusters;
    if (2 * slice_tiles(vocab, cluster, element_bytes) <= plan.tiles) break;
  }
  return plan;
}

// Bytes of a contiguous piece before, in and after its 16-byte vectors.
struct Edges {
  int head, body, tail;

  GRPO_DEVICE Edges(const void* address, int bytes) {
    const int before = int(-reinterpret_cast<intptr_t>(address) & 15);
    head = before < bytes ? before : bytes;
    body = (bytes - head) & ~15;
    tail = bytes - head - body;
  }
};

}  // namespace grpo
