// One input is one call of the C ABI of the CPU library: which function, rows of which sizes and strides, what is in
// every tensor, which pointers are null, which numbers are none. The call must keep to its memory, answer with the
// status that the struct deserves, and leave what it does not own as it was.
//
// With clang it is libFuzzer's target (-fsanitize=fuzzer); driver.cpp calls it elsewhere.
#include <math.h>
#include <stdio.h>

#include "../../csrc/common/surrogates.h"
#include "../../csrc/cpu/api.h"
#include "memory.h"

namespace {

#define REQUIRE(condition) require(condition, #condition, __LINE__)

void require(bool holds, const char* what, int line) {
  if (holds) return;
  fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, line, what);
  abort();
}

enum Entry {
  kEntryLogProbs,
  kEntryLogProbsBackward,
  kEntryFusedLoss,
  kEntryDivergence,
  kEntryDivergenceBackward,
  kEntryFusedDivergence,
  kEntryTokenTerms,
  kEntryTokenSums,
  kEntryBlocks,
  kEntries
};

size_t size_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

constexpr double kSpecial[] = {0,    -0.0,  1,      -1,      INFINITY, -INFINITY, NAN,   1e-45, -1e-45,
                               1e38, -1e38, 3.4e38, -3.4e38, 2e9,      -2e9,      1e300, 65504, -65504};

// Numbers of a dtype: ordinary ones, extremes among them, or nothing but the input's bits.
void fill(Input& in, void* data, size_t count, int dtype) {
  const int mode = int(in.below(4));
  uint64_t state = in.word() | 1;
  for (size_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint64_t bits = state >> 11;
    double x = double(int64_t(bits % 4001) - 2000) / 200;
    if (mode == 1 && bits % 16 == 0) x = kSpecial[bits / 16 % (sizeof kSpecial / sizeof *kSpecial)];
    if (mode == 2) x = -double(bits % 1000) / 100;
    char* at = static_cast<char*>(data) + i * size_of(dtype);
    const float narrow = float(x);
    uint32_t half;
    memcpy(&half, &narrow, 4);
    if (mode == 3) {
      memcpy(at, &state, size_of(dtype));
    } else if (dtype == kFloat64) {
      memcpy(at, &x, 8);
    } else if (dtype == kFloat32) {
      memcpy(at, &narrow, 4);
    } else {  // bf16 by cutting; of fp16 these are other numbers, as good
      const uint16_t cut = uint16_t(half >> 16);
      memcpy(at, &cut, 2);
    }
  }
}

// A matrix of rows somewhere in memory of its own, and what lies between them.
struct Matrix {
  char* first;
  int64_t batch_stride, row_stride;
  size_t bytes;
  char* start;
};

Matrix matrix(Input& in, Arena& arena, int64_t rows, int64_t length, int64_t vocab, int dtype) {
  Matrix m;
  const int64_t batches = (rows + length - 1) / length;
  m.row_stride = vocab + in.below(7);
  m.batch_stride = length * m.row_stride + in.below(7);
  const int64_t offset = in.below(5);
  int64_t elements = offset + vocab;
  if (rows > 0) elements += (batches - 1) * m.batch_stride + (length - 1) * m.row_stride;
  m.bytes = size_t(elements) * size_of(dtype);
  m.start = static_cast<char*>(arena.get(m.bytes, in.one_in(2)));
  m.first = m.start + offset * size_of(dtype);
  fill(in, m.start, size_t(elements), dtype);
  if (in.one_in(4) && batches > 1) {  // the last sequence first
    m.first += (batches - 1) * m.batch_stride * int64_t(size_of(dtype));
    m.batch_stride = -m.batch_stride;
  }
  return m;
}

struct Call {
  GrpoCpuParams p;
  Arena arena;
  int entry, real;

  void* reals(Input& in, int64_t count) {
    void* data = arena.get(size_t(count) * size_of(real), in.one_in(2));
    fill(in, data, size_t(count), real);
    return data;
  }
};

// The pointers that a function reads or writes, whatever is in the tensors.
std::vector<void**> needed(Call& call) {
  GrpoCpuParams& p = call.p;
  const auto of = [](auto& pointer) { return (void**)&pointer; };
  std::vector<void**> out;
  const auto add = [&](auto&... pointers) { (out.push_back(of(pointers)), ...); };
  const int entry = call.entry;
  add(p.log_prob, p.entropy, p.numbers);
  if (entry == kEntryTokenTerms) add(p.grad_log_prob);
  if (entry != kEntryTokenTerms) add(p.anchor, p.log_sum, p.logits, p.token_ids, p.scratch);
  if (entry == kEntryLogProbsBackward || entry == kEntryDivergenceBackward) add(p.out);
  if (entry == kEntryFusedLoss || entry == kEntryFusedDivergence || entry == kEntryTokenTerms) {
    add(p.advantage, p.policy_weight, p.policy, p.kl, p.flags);
    if (p.rollout_scheme) add(p.rollout_weight);
    if (p.rollout_kl_estimator) add(p.rollout_kl);
  }
  if (entry >= kEntryDivergence && entry <= kEntryFusedDivergence) {
    add(p.teacher_logits, p.teacher_numbers, p.teacher_anchor, p.teacher_log_sum);
    add(p.divergence, p.shift, p.centre, p.mean);
    if (entry != kEntryDivergence) add(p.grad_divergence);
    if (entry == kEntryFusedDivergence) add(p.teacher_log_prob, p.teacher_entropy);
  }
  return out;
}

void make_numbers(Input& in, Call& call, const void*& numbers, bool hostile) {
  void* data = call.reals(in, grpo::kNumbers);
  if (!hostile) {
    const double plain[] = {1,        1, double(in.one_in(4)) * 5, 1, 20, 20, INFINITY, 10, 0, 2, -INFINITY, 0.5, 20,
                            INFINITY, 10};
    for (int i = 0; i < int(sizeof plain / sizeof *plain); ++i) {
      if (call.real == kFloat64) static_cast<double*>(data)[i] = plain[i];
      if (call.real != kFloat64) static_cast<float*>(data)[i] = float(plain[i]);
    }
  }
  numbers = data;
}

// A number that no call has in the place of one; false: none of these, the call stays as it is.
bool spoil(Input& in, Call& call) {
  GrpoCpuParams& p = call.p;
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
      const std::vector<void**> pointers = needed(call);
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

// The bytes of memory that holds rows, but for the rows that may be written.
std::vector<char> outside(const Call& call, const Matrix& m) {
  std::vector<char> bytes(m.start, m.start + m.bytes);
  const size_t size = size_of(call.p.dtype);
  for (int64_t r = 0; r < call.p.rows; ++r) {
    const int64_t at = r / call.p.length * m.batch_stride + r % call.p.length * m.row_stride;
    memset(bytes.data() + (m.first - m.start) + at * int64_t(size), 0, size_t(call.p.vocab) * size);
  }
  return bytes;
}

void call_rows(Input& in, int entry) {
  Call call;
  GrpoCpuParams& p = call.p;
  memset(&p, 0, sizeof p);
  call.entry = entry;
  const bool spoils = in.one_in(4);
  p.dtype = int32_t(in.below(4));
  call.real = p.dtype == kFloat64 ? kFloat64 : kFloat32;
  constexpr int64_t kVocabs[] = {1, 2, 7, 16, 33, 64, 100, 255, 4095, 4096, 4097, 8193};
  p.rows = in.below(7);
  p.length = 1 + in.below(4);
  p.vocab = kVocabs[in.below(12)];
  p.threads = 1 + int32_t(in.below(3));
  do p.instruction_set = int32_t(in.below(kInstructionSets));
  while (!(grpo_cpu_instruction_sets() >> p.instruction_set & 1) && in.byte());
  const bool runs = grpo_cpu_instruction_sets() >> p.instruction_set & 1;
  const bool pair = entry >= kEntryDivergence && entry <= kEntryFusedDivergence;

  const Matrix logits = matrix(in, call.arena, p.rows, p.length, p.vocab, p.dtype);
  p.logits = logits.first, p.batch_stride = logits.batch_stride, p.row_stride = logits.row_stride;
  const bool writes = entry == kEntryLogProbsBackward || entry == kEntryDivergenceBackward ||
                      ((entry == kEntryFusedLoss || entry == kEntryFusedDivergence) && !in.one_in(4));
  const Matrix out = in.one_in(3) ? logits : matrix(in, call.arena, p.rows, p.length, p.vocab, p.dtype);
  if (writes) p.out = out.first, p.out_batch_stride = out.batch_stride, p.out_row_stride = out.row_stride;

  int64_t* ids = static_cast<int64_t*>(call.arena.get(size_t(p.rows) * 8));
  uint8_t* live = static_cast<uint8_t*>(call.arena.get(size_t(p.rows)));
  int64_t bad_row = -1;
  for (int64_t r = 0; r < p.rows; ++r) {
    live[r] = uint8_t(in.below(3));
    ids[r] = in.one_in(16) ? int64_t(in.word()) : int64_t(in.byte()) % p.vocab;
    if (live[r] && (ids[r] < 0 || ids[r] >= p.vocab) && bad_row < 0) bad_row = r;
  }
  p.token_ids = ids, p.live = live;
  make_numbers(in, call, p.numbers, in.one_in(4));
  if (in.one_in(4)) p.temperature = call.reals(in, p.rows);

  void** records[] = {
      &p.log_prob,         &p.entropy,         &p.anchor,         &p.log_sum,         &p.policy,       &p.kl,
      &p.rollout_weight,   &p.rollout_kl,      &p.divergence,     &p.shift,           &p.centre,       &p.mean,
      &p.teacher_log_prob, &p.teacher_entropy, &p.teacher_anchor, &p.teacher_log_sum, &p.grad_log_prob};
  for (void** record : records) *record = call.reals(in, p.rows);
  const void** inputs[] = {&p.advantage, &p.policy_weight,  &p.grad_divergence,   &p.old,         &p.ref, &p.rollout,
                           &p.kl_weight, &p.entropy_weight, &p.rollout_kl_weight, &p.grad_entropy};
  for (const void** input : inputs) *input = call.reals(in, p.rows);
  for (const void** input :
       {&p.old, &p.ref, &p.rollout, &p.kl_weight, &p.entropy_weight, &p.rollout_kl_weight, &p.grad_entropy})
    if (in.one_in(3)) *input = nullptr;
  if (entry != kEntryTokenTerms && in.one_in(4)) p.grad_log_prob = nullptr;
  p.flags = static_cast<uint8_t*>(call.arena.get(size_t(p.rows)));

  int32_t* choices[] = {
      &p.surrogate,      &p.kl_estimator,         &p.kl_gradient,         &p.kl_ratio_weighted,
      &p.rollout_scheme, &p.rollout_kl_estimator, &p.rollout_kl_gradient, &p.rollout_kl_ratio_weighted};
  for (int32_t* choice : choices) *choice = in.one_in(16) ? int32_t(in.word()) : int32_t(in.below(8));
  p.divergence_kind = in.one_in(16) ? int32_t(in.word()) : int32_t(in.below(7));
  p.teacher_dtype = p.dtype;
  if (pair) {
    if (p.dtype != kFloat64 && in.one_in(2)) p.teacher_dtype = int32_t(in.one_in(2) ? kBFloat16 : kFloat32);
    const Matrix teacher = matrix(in, call.arena, p.rows, p.length, p.vocab, p.teacher_dtype);
    p.teacher_logits = teacher.first;
    p.teacher_batch_stride = teacher.batch_stride, p.teacher_row_stride = teacher.row_stride;
    make_numbers(in, call, p.teacher_numbers, in.one_in(4));
    if (in.one_in(4)) p.teacher_temperature = call.reals(in, p.rows);
  }
  const bool exponentials =
      entry == kEntryDivergence || entry == kEntryFusedDivergence || (entry == kEntryFusedLoss && p.dtype != call.real);
  p.scratch_stride = grpo_cpu_scratch(p.vocab, pair ? 2 : 1, exponentials);
  REQUIRE(p.scratch_stride > 0);
  p.scratch = call.arena.get(size_t(p.threads) * size_t(p.scratch_stride) * size_of(call.real));

  const std::vector<char> logits_before(logits.start, logits.start + logits.bytes), around = outside(call, out);
  const GrpoCpuParams good = p;
  const int64_t rows = p.rows;
  const bool spoiled = spoils && rows > 0 && spoil(in, call);
  const int32_t status = answer(entry, &p);
  if (spoiled) {
    REQUIRE(status != kOk);
    REQUIRE(logits_before == std::vector<char>(logits.start, logits.start + logits.bytes));
    return;
  }
  if (entry != kEntryTokenTerms) {
    if (!runs) return REQUIRE(status == kUnsupportedInstructionSet);
    if (bad_row >= 0) {
      REQUIRE(status == kTokenIdOutOfRange && p.bad_row == bad_row);
      return;
    }
  }
  REQUIRE(status == kOk);
  if (entry == kEntryTokenTerms) return;
  if (!good.out || out.start != logits.start)
    REQUIRE(logits_before == std::vector<char>(logits.start, logits.start + logits.bytes));
  REQUIRE(around == outside(call, out) || !good.out);
  for (int64_t r = 0; good.out && r < rows; ++r) {
    const int64_t at = (r / p.length * out.batch_stride + r % p.length * out.row_stride) * int64_t(size_of(p.dtype));
    for (int64_t i = 0; !live[r] && i < p.vocab * int64_t(size_of(p.dtype)); ++i) REQUIRE(out.first[at + i] == 0);
  }
}

void call_token_sums(Input& in) {
  Call call;
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
    GrpoBytes* block = grpo_cpu_new_block(bytes, kind, in.one_in(2));
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
