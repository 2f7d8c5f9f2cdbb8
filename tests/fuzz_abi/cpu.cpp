// One input is one call of the C ABI of the CPU library: which function, rows of which sizes and strides, what is in
// every tensor, which pointers are null, which numbers are none. The call must keep to its memory, answer with the
// status that the struct deserves, and leave what it does not own as it was.
//
// With clang it is libFuzzer's target (-fsanitize=fuzzer); driver.cpp calls it elsewhere.
#include "../../csrc/cpu/api.h"
#include "rows.h"

namespace {

enum { kEntryTokenTerms = kRowEntries, kEntryTokenSums, kEntryBlocks, kEntries };

int64_t any_id(Input& in) { return int64_t(in.word()); }

constexpr Library kCpu{{1, 2, 7, 16, 33, 64, 100, 255, 4095, 4096, 4097, 8193}, true, true, 1, any_id};

// A number that no call has in the place of one; false: none of these, the call stays as it is.
bool spoil(Input& in, const Call& call, GrpoCpuParams& p) {
  const int64_t hostile = in.hostile();
  const bool of_rows = call.entry != kEntryTokenTerms;
  switch (in.below(8)) {
    case 0: return hostile < 0 || hostile > (int64_t(1) << 47) ? (p.rows = hostile, true) : false;
    case 1: return of_rows && hostile <= 0 ? (p.length = hostile, true) : false;
    case 2: return of_rows && (hostile <= 0 || hostile > (int64_t(1) << 47)) ? (p.vocab = hostile, true) : false;
    case 3: return of_rows && int32_t(hostile) <= 0 ? (p.threads = int32_t(hostile), true) : false;
    case 4: return of_rows && hostile < p.scratch_stride ? (p.scratch_stride = hostile, true) : false;
    case 5: return int32_t(hostile) < 0 || int32_t(hostile) > 3 ? (p.dtype = int32_t(hostile), true) : false;
    case 6:
      if (!of_rows || uint32_t(hostile) < uint32_t(kInstructionSets)) return false;
      p.instruction_set = int32_t(hostile);
      return true;
    default: {
      std::vector<void**> pointers = needed(call, true);
      if (of_rows) pointers.insert(pointers.begin() + 7, &p.scratch);
      *pointers[in.byte() % pointers.size()] = nullptr;
      return true;
    }
  }
}

int32_t answer(int entry, GrpoCpuParams* p) {
  switch (entry) {
    case kEntryLogProbs: return grpo_cpu_log_probs(p);
    case kEntryLogProbsBackward: return grpo_cpu_log_probs_backward(p);
    case kEntryFusedLoss: return grpo_cpu_fused_loss(p);
    case kEntryDivergence: return grpo_cpu_divergence(p);
    case kEntryDivergenceBackward: return grpo_cpu_divergence_backward(p);
    case kEntryFusedDivergence: return grpo_cpu_fused_divergence(p);
    default: return grpo_cpu_token_terms(p);
  }
}

void call_rows(Input& in, int entry) {
  GrpoCpuParams p;
  memset(&p, 0, sizeof p);
  Call call{p, entry};
  const bool spoils = in.one_in(4);
  make_sizes(in, call, kCpu);
  p.threads = 1 + int32_t(in.below(3));
  do p.instruction_set = int32_t(in.below(kInstructionSets));
  while (!(grpo_cpu_instruction_sets() >> p.instruction_set & 1) && in.byte());
  const bool runs = grpo_cpu_instruction_sets() >> p.instruction_set & 1;
  make_tensors(in, call, kCpu);
  const bool exponentials =
      entry == kEntryDivergence || entry == kEntryFusedDivergence || (entry == kEntryFusedLoss && p.dtype != call.real);
  p.scratch_stride = grpo_cpu_scratch(p.vocab, is_pair(entry) ? 2 : 1, exponentials);
  REQUIRE(p.scratch_stride > 0);
  p.scratch = call.arena.get(size_t(p.threads) * size_t(p.scratch_stride) * size_of(call.real));

  const Before before(call, {p.scratch});
  const bool spoiled = spoils && p.rows > 0 && spoil(in, call, p);
  const int32_t status = answer(entry, &p);
  if (spoiled) {
    REQUIRE(status != kOk);
    return before.require_untouched();
  }
  if (entry != kEntryTokenTerms) {
    if (!runs) return REQUIRE(status == kUnsupportedInstructionSet);
    if (call.bad_row >= 0) {
      REQUIRE(status == kTokenIdOutOfRange && p.bad_row == call.bad_row);
      return;
    }
  }
  REQUIRE(status == kOk);
  before.require_only_outputs();
}

void call_token_sums(Input& in) {
  GrpoCpuParams none;
  Call call{none, kEntryTokenSums};
  GrpoCpuTokenSums s;
  memset(&s, 0, sizeof s);
  s.dtype = in.one_in(2) ? kFloat64 : kFloat32;
  call.real = s.dtype;
  s.rows = in.one_in(4) ? 500 + in.below(40) : in.below(9);
  s.sequences = int64_t(in.word());
  s.threads = 1 + int32_t(in.below(3));
  s.kl_estimator = in.one_in(8) ? int32_t(in.word()) : int32_t(in.below(5));
  const void** inputs[] = {&s.log_prob, &s.entropy, &s.advantage, &s.policy_weight,  &s.old,
                           &s.ref,      &s.rollout, &s.kl_weight, &s.entropy_weight, &s.rollout_kl_weight};
  for (const void** input : inputs) *input = call.reals(in, s.rows);
  for (void** record : {&s.policy, &s.kl, &s.rollout_weight, &s.rollout_kl}) *record = call.reals(in, s.rows);
  for (const void** input : {&s.old, &s.ref, &s.rollout, &s.kl_weight, &s.entropy_weight, &s.rollout_kl_weight})
    if (in.one_in(3)) *input = nullptr;
  const uint8_t** bytes[] = {&s.live, &s.masked_in, const_cast<const uint8_t**>(&s.flags)};
  for (const uint8_t** one : bytes) {
    uint8_t* data = static_cast<uint8_t*>(call.arena.get(size_t(s.rows)));
    for (int64_t r = 0; r < s.rows; ++r) data[r] = uint8_t(in.byte() & (one == bytes[2] ? 255 : 1));
    *one = data;
  }
  s.partials = static_cast<double*>(call.arena.get(size_t(grpo_cpu_partial_sums(s.rows)) * 8));
  s.sums = static_cast<double*>(call.arena.get(size_t(grpo_cpu_partial_sums(1)) * 8));
  s.loss = call.arena.get(size_of(s.dtype));
  if (!in.one_in(4)) return REQUIRE(grpo_cpu_token_sums(&s) == kOk);
  const int64_t hostile = in.hostile();
  const void** pointers[] = {&s.log_prob, &s.entropy, (const void**)&s.live, (const void**)&s.partials};
  switch (in.below(5)) {
    case 0: s.rows = hostile == INT64_MAX ? hostile : hostile < 0 ? hostile : -1; break;
    case 1: s.threads = -int32_t(in.byte()); break;
    case 2: s.dtype = kFloat16 + 1 + int32_t(in.byte()); break;
    case 3: s.loss = nullptr; break;
    default:
      if (s.rows == 0) return;
      *pointers[in.below(4)] = nullptr;
  }
  REQUIRE(grpo_cpu_token_sums(&s) != kOk);
}

void call_blocks(Input& in) {
  std::vector<GrpoBytes*> taken;
  for (int i = int(in.below(6)); i >= 0; --i) {
    const int64_t bytes = in.one_in(3) ? in.hostile() : 1 + in.byte() * int64_t(20011);
    const int32_t kind = in.one_in(4) ? int32_t(in.word()) : int32_t(in.below(kBlockKinds));
    if (bytes > (int64_t(1) << 30) && bytes <= (int64_t(1) << 47)) continue;  // so much the system may have or not
    GrpoBytes* block;
    grpo_cpu_new_block(bytes, kind, in.one_in(2), &block);
    const bool asked = bytes > 0 && bytes <= (int64_t(1) << 47) && kind >= 0 && kind < kBlockKinds;
    REQUIRE((block != nullptr) == asked);
    if (!block) continue;
    memset(block->data, 1, size_t(bytes < 4096 ? bytes : 4096));
    static_cast<char*>(block->data)[bytes - 1] = 1;
    if (in.one_in(2))
      taken.push_back(block);
    else
      grpo_cpu_give_back(block);
  }
  for (GrpoBytes* block : taken) grpo_cpu_give_back(block);
  grpo_cpu_give_back(nullptr);
  REQUIRE(grpo_cpu_block_bytes().used == 0);
  REQUIRE(grpo_cpu_drop_kept() >= 0 && grpo_cpu_block_bytes().kept == 0);
  REQUIRE(grpo_cpu_partial_sums(in.hostile()) >= 0);
  REQUIRE(grpo_cpu_scratch(in.hostile(), int32_t(in.below(5)) - 1, in.byte()) >= 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int entry = int(in.below(kEntries + 1));
  if (entry == kEntries) {
    for (int one = 0; one < kEntryTokenSums; ++one) REQUIRE(answer(one, nullptr) == kBadCall);
    REQUIRE(grpo_cpu_token_sums(nullptr) == kBadCall);
  } else if (entry == kEntryTokenSums) {
    call_token_sums(in);
  } else if (entry == kEntryBlocks) {
    call_blocks(in);
  } else {
    call_rows(in, entry);
  }
  return 0;
}
