// One input is one call of the C ABI of the CUDA library, over the emulator: as cpu.cpp, and how a row is laid out, in
// which order threads and copies take their turns, devices and rows that are asked a layout for. A good call comes to
// its end whatever the order is; a call that is none is told by its status alone.
#include "../../csrc/cuda/api.h"
#include "rows.h"

extern "C" void grpo_emulator_seed(uint64_t);

namespace {

enum { kEntryPlan = kRowEntries, kEntries };

constexpr int64_t kTileBytes = 16384, kMostTiles = 16, kMostRows = 1 << 30,
                  kMostRowBytes = 16 * kMostTiles * kTileBytes;
// What a host takes for a small number if it keeps 32 bits of it, and others.
int64_t hostile_of(Input& in) {
  constexpr int64_t kWord = int64_t(1) << 32;
  const int64_t numbers[] = {INT32_MAX, int64_t(INT32_MAX) + 1, kWord, kWord + 1, kWord * kWord / 2 + kWord + 1};
  const int64_t which = in.below(8);
  return which < 5 ? numbers[which] : in.hostile();
}

constexpr Library kCuda{{1, 2, 7, 33, 100, 255, 1023, 2049, 4097, 8193, 12300, 20011}, false, false, 16, hostile_of};

int64_t slice_tiles(const GrpoCudaParams& p) {
  const int64_t width = 16 / int64_t(size_of(p.dtype)), vectors = (p.vocab + width - 1) / width;
  return ((vectors + p.cluster - 1) / p.cluster * 16 + kTileBytes - 1) / kTileBytes;
}

// Fewer places of the ring than this would never come to an end.
int64_t places_needed(const GrpoCudaParams& p, int entry) {
  if (is_fused(entry)) return slice_tiles(p);
  return is_backward(entry) ? std::min(slice_tiles(p), int64_t(3)) : 1;
}

GrpoCudaDevice device() {
  GrpoCudaDevice found;
  memset(&found, 0, sizeof found);
  REQUIRE(grpo_cuda_device(0, &found) == 0);
  return found;
}

// As the device has it, or any other layout that is one. False: the device refuses it.
bool lay_out(Input& in, GrpoCudaParams& p, int entry) {
  static const GrpoCudaDevice offered = device();
  const int rows = is_pair(entry) ? 2 : 1;
  GrpoCudaPlan plan;
  grpo_cuda_plan(&offered, p.dtype, p.vocab, rows, &plan);
  const int64_t most = plan.tiles;
  REQUIRE(plan.cluster > 0 && most > 0 && most <= kMostTiles);
  p.cluster = plan.cluster, p.clusters = plan.clusters, p.tiles = plan.tiles;
  if (in.one_in(2)) return true;
  p.cluster = 1 << (in.one_in(16) ? 3 : in.below(3));
  p.clusters = 1 + int32_t(in.below(3));
  const int64_t needed = places_needed(p, entry);
  if (needed > most) p.cluster = plan.cluster;
  p.tiles = int32_t(std::min(places_needed(p, entry) + in.below(4), most));
  if (!in.one_in(32) || most == kMostTiles) return true;
  p.tiles = kMostTiles;
  return false;
}

// A number that no call has in the place of one; false: none of these, the call stays as it is.
bool spoil(Input& in, const Call& call, GrpoCudaParams& p) {
  const int64_t hostile = hostile_of(in), size = int64_t(size_of(p.dtype));
  const int32_t narrow = int32_t(hostile);
  const int64_t batches = (p.rows - 1) / p.length, steps = std::min(p.rows, p.length) - 1;
  const bool stays = hostile == 0 || llabs(hostile + (hostile == INT64_MIN)) <= (int64_t(1) << 47);
  switch (in.below(12)) {
    case 0: return hostile < 0 || hostile > kMostRows ? (p.rows = hostile, true) : false;
    case 1: return hostile <= 0 || hostile > kMostRows ? (p.length = hostile, true) : false;
    case 2: return hostile <= 0 || hostile > kMostRowBytes / size ? (p.vocab = hostile, true) : false;
    case 3: return narrow < 0 || narrow > 3 ? (p.dtype = narrow, true) : false;
    case 4: {
      const bool known = narrow == 1 || narrow == 2 || narrow == 4 || narrow == 8 || narrow == 16;
      p.cluster = known ? 3 + 2 * int32_t(in.below(7)) : narrow;
      return true;
    }
    case 5: return narrow <= 0 || narrow > 1 << 16 ? (p.clusters = narrow, true) : false;
    case 6: return narrow <= 0 || narrow > kMostTiles ? (p.tiles = narrow, true) : false;
    case 7: p.tiles = int32_t(in.below(places_needed(p, call.entry))); return true;
    case 8: return is_pair(call.entry) ? (p.teacher_dtype = (p.dtype + 1 + int32_t(in.below(3))) % 4, true) : false;
    case 9: {
      const bool of_batch = in.one_in(2);
      if (stays || (of_batch ? batches : steps) == 0) return false;
      int64_t* strides[][2] = {{&p.row_stride, &p.batch_stride},
                               {&p.teacher_row_stride, &p.teacher_batch_stride},
                               {&p.out_row_stride, &p.out_batch_stride}};
      const int64_t which = in.below(3);
      if ((which == 1 && !is_pair(call.entry)) || (which == 2 && !p.out)) return false;
      *strides[which][of_batch] = hostile;
      return true;
    }
    case 10:  // the gradient beside the vectors of the logits, or what slices have to say
      if (!p.out) return (p.partials = static_cast<char*>(p.partials) + 8, true);
      switch (in.below(3)) {
        case 0: return (p.out = static_cast<char*>(p.out) + size, true);
        case 1: return steps ? (++p.out_row_stride, true) : false;
        default: return batches ? (++p.out_batch_stride, true) : false;
      }
    default: {
      std::vector<void**> pointers = needed(call, false);
      pointers.push_back((void**)&p.order);
      if (!p.out) pointers.push_back(&p.partials);
      *pointers[in.byte() % pointers.size()] = nullptr;
      return true;
    }
  }
}

int32_t answer(int entry, const GrpoCudaParams* p) {
  switch (entry) {
    case kEntryLogProbs: return grpo_cuda_log_probs(p);
    case kEntryLogProbsBackward: return grpo_cuda_log_probs_backward(p);
    case kEntryFusedLoss: return grpo_cuda_fused_loss(p);
    case kEntryDivergence: return grpo_cuda_divergence(p);
    case kEntryDivergenceBackward: return grpo_cuda_divergence_backward(p);
    default: return grpo_cuda_fused_divergence(p);
  }
}

bool is_nan(const Call& call, const void* reals, int64_t r) {
  return call.real == kFloat64 ? isnan(static_cast<const double*>(reals)[r])
                               : isnan(static_cast<const float*>(reals)[r]);
}

void call_rows(Input& in, int entry) {
  GrpoCudaParams p;
  memset(&p, 0, sizeof p);
  Call call{p, entry};
  const bool spoils = in.one_in(4);
  grpo_emulator_seed(in.word());
  make_sizes(in, call, kCuda);
  const bool fits = lay_out(in, p, entry);
  make_tensors(in, call, kCuda);
  // A block without a row would read what lies before it, one that counts too many what lies past it.
  p.order = static_cast<int32_t*>(call.arena.get(size_t(p.rows + 1) * 4, p.rows % 2 == 0));
  const bool sums = entry == kEntryLogProbs || entry == kEntryDivergence;
  const int64_t numbers = entry == kEntryLogProbs ? 4 : 12;
  if (sums) p.partials = call.arena.get(size_t(p.rows * p.cluster * numbers) * size_of(call.real));

  const Before before(call, {p.order, p.partials});
  const bool spoiled = spoils && p.rows > 0 && spoil(in, call, p);
  const int32_t status = answer(entry, &p);
  if (spoiled) {
    REQUIRE(status == kBadCall);
    return before.require_untouched();
  }
  if (p.rows == 0) {
    REQUIRE(status == 0);
    return before.require_untouched();
  }
  if (!fits) return REQUIRE(status > 0);  // before a row is read
  if (status) fprintf(stderr, "%s\n", grpo_cuda_error(status));
  REQUIRE(status == 0);
  before.require_only_outputs();
  for (int64_t r = 0; (entry == kEntryLogProbs || entry == kEntryFusedLoss) && r < p.rows; ++r)
    if (p.live[r] && (p.token_ids[r] < 0 || p.token_ids[r] >= p.vocab)) REQUIRE(is_nan(call, p.log_prob, r));
}

// Any device and any row: a layout of it, or none.
void call_plan(Input& in) {
  GrpoCudaDevice some;
  memset(&some, 0, sizeof some);
  bool known = true;
  some.shared_bytes = in.one_in(4) ? int32_t(hostile_of(in)) : 2000 * int32_t(in.byte());
  known = known && some.shared_bytes >= 0;
  for (int32_t& clusters : some.clusters) {
    clusters = in.one_in(8) ? int32_t(hostile_of(in)) : int32_t(in.below(140));
    known = known && clusters >= 0 && clusters <= 1 << 16;
  }
  const int32_t dtype = in.one_in(8) ? int32_t(hostile_of(in)) : int32_t(in.below(4));
  const int64_t vocab = in.one_in(2) ? hostile_of(in) : in.byte() * in.byte() * int64_t(64);
  const int32_t rows = in.one_in(8) ? int32_t(hostile_of(in)) : 1 + int32_t(in.below(2));
  known = known && dtype >= 0 && dtype <= 3 && vocab >= 0 && (rows == 1 || rows == 2);
  GrpoCudaPlan plan{-1, -1, -1};
  grpo_cuda_plan(&some, dtype, vocab, rows, &plan);
  REQUIRE(plan.cluster >= 0 && plan.cluster <= 16 && plan.tiles <= kMostTiles);
  if (!known) REQUIRE(plan.cluster == 0);
  if (!plan.cluster) return;
  GrpoCudaParams p;
  memset(&p, 0, sizeof p);
  p.dtype = dtype, p.vocab = vocab, p.cluster = plan.cluster;
  REQUIRE(slice_tiles(p) <= plan.tiles && vocab * int64_t(size_of(dtype)) <= kMostRowBytes);
  REQUIRE(plan.clusters > 0 && plan.clusters <= 1 << 16);
}

void call_nothing() {
  GrpoCudaDevice some = device();
  GrpoCudaPlan plan{-1, -1, -1};
  for (int entry = 0; entry < kRowEntries; ++entry) REQUIRE(answer(entry, nullptr) == kBadCall);
  REQUIRE(grpo_cuda_device(0, nullptr) == kBadCall);
  grpo_cuda_plan(&some, kFloat32, 100, 1, nullptr);
  grpo_cuda_plan(nullptr, kFloat32, 100, 1, &plan);
  REQUIRE(plan.cluster == 0);
  REQUIRE(strlen(grpo_cuda_error(kBadCall)) > 0 && grpo_cuda_error(1));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int entry = int(in.below(kEntries + 1));
  if (entry == kEntries) {
    call_nothing();
  } else if (entry == kEntryPlan) {
    call_plan(in);
  } else {
    call_rows(in, entry);
  }
  return 0;
}
