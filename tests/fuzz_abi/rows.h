// Calls over rows, as every library has them: their sizes, what is in every tensor, which pointers they need, what they
// may write. A target per library makes calls of these and of what is its own.
#pragma once

#include <math.h>
#include <stdio.h>

#include "../../csrc/common/call.h"
#include "../../csrc/common/surrogates.h"
#include "memory.h"

namespace {

#define REQUIRE(condition) require(condition, #condition, __FILE__, __LINE__)

void require(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
  abort();
}

// Functions of a target's own follow.
enum Entry {
  kEntryLogProbs,
  kEntryLogProbsBackward,
  kEntryFusedLoss,
  kEntryDivergence,
  kEntryDivergenceBackward,
  kEntryFusedDivergence,
  kRowEntries
};

bool is_backward(int entry) { return entry == kEntryLogProbsBackward || entry == kEntryDivergenceBackward; }
bool is_fused(int entry) { return entry == kEntryFusedLoss || entry == kEntryFusedDivergence; }
bool is_pair(int entry) { return entry >= kEntryDivergence && entry <= kEntryFusedDivergence; }

// What a library asks beyond what all do.
struct Library {
  int64_t vocabs[12];
  bool gradient_optional, teacher_of_any_dtype;
  int64_t vector;  // bytes: rows are read by so many at once, and a gradient's lie in them as the logits do
  int64_t (*any_id)(Input&);
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

// The least number from x on that is as far from a multiple of the width as y is.
int64_t alike(int64_t x, int64_t y, int64_t width) { return x + ((y - x) % width + width) % width; }

// In whole vectors of memory; `like`: its rows begin as far from a multiple of a vector as this one's, in its order.
Matrix matrix(Input& in, Arena& arena, const GrpoCall& p, int dtype, int64_t vector, const Matrix* like = nullptr) {
  Matrix m;
  const int64_t batches = (p.rows + p.length - 1) / p.length, size = int64_t(size_of(dtype));
  const int64_t width = vector > size ? vector / size : 1;
  m.row_stride = p.vocab + in.below(7);
  if (like) m.row_stride = alike(m.row_stride, like->row_stride, width);
  m.batch_stride = p.length * m.row_stride + in.below(7);
  if (like) m.batch_stride = alike(m.batch_stride, llabs(like->batch_stride), width);
  int64_t offset = in.below(5);
  const bool backwards = like && like->batch_stride < 0;
  if (like) {
    const int64_t skipped = backwards ? (batches - 1) * -like->batch_stride : 0;
    offset = alike(offset, (like->first - like->start) / size - skipped, width);
  }
  int64_t elements = offset + p.vocab;
  if (p.rows > 0) elements += (batches - 1) * m.batch_stride + (p.length - 1) * m.row_stride;
  m.bytes = size_t((elements * size + vector - 1) / vector * vector);
  m.start = static_cast<char*>(arena.get(m.bytes, in.one_in(2)));
  m.first = m.start + offset * size;
  fill(in, m.start, m.bytes / size_t(size), dtype);
  if (like ? backwards : in.one_in(4) && batches > 1) {  // the last sequence first
    m.first += (batches - 1) * m.batch_stride * size;
    m.batch_stride = -m.batch_stride;
  }
  return m;
}

struct Call {
  GrpoCall& p;
  int entry, real = kFloat32;
  Arena arena{};
  Matrix logits{}, out{};
  int64_t bad_row = -1;  // the first live one whose token id is none

  void* reals(Input& in, int64_t count) {
    void* data = arena.get(size_t(count) * size_of(real), in.one_in(2));
    fill(in, data, size_t(count), real);
    return data;
  }
};

// The pointers that a function reads or writes, whatever is in the tensors.
std::vector<void**> needed(const Call& call, bool gradient_optional) {
  GrpoCall& p = call.p;
  const auto of = [](auto& pointer) { return (void**)&pointer; };
  std::vector<void**> out;
  const auto add = [&](auto&... pointers) { (out.push_back(of(pointers)), ...); };
  const int entry = call.entry;
  add(p.log_prob, p.entropy, p.numbers);
  if (entry >= kRowEntries) add(p.grad_log_prob);
  if (entry < kRowEntries) add(p.anchor, p.log_sum, p.logits, p.token_ids);
  if (is_backward(entry) || (is_fused(entry) && !gradient_optional)) add(p.out);
  if (is_fused(entry) || entry >= kRowEntries) {
    add(p.advantage, p.policy_weight, p.policy, p.kl, p.flags);
    if (p.rollout_scheme) add(p.rollout_weight);
    if (p.rollout_kl_estimator) add(p.rollout_kl);
  }
  if (is_pair(entry)) {
    add(p.teacher_logits, p.teacher_numbers, p.teacher_anchor, p.teacher_log_sum);
    add(p.divergence, p.shift, p.centre, p.mean);
    if (entry != kEntryDivergence) add(p.grad_divergence);
    if (entry == kEntryFusedDivergence) add(p.teacher_log_prob, p.teacher_entropy);
  }
  return out;
}

// The buffers of tokens that a function may write.
std::vector<const void*> written(const Call& call) {
  const GrpoCall& p = call.p;
  const bool tokens = call.entry >= kRowEntries;
  std::vector<const void*> out;
  if (call.entry == kEntryLogProbs || is_fused(call.entry)) out = {p.log_prob, p.entropy, p.anchor, p.log_sum};
  if (is_fused(call.entry) || tokens) {
    for (const void* record : {(const void*)p.policy, (const void*)p.kl, (const void*)p.flags}) out.push_back(record);
    if (p.rollout_scheme) out.push_back(p.rollout_weight);
    if (p.rollout_kl_estimator) out.push_back(p.rollout_kl);
  }
  if (tokens) out.push_back(p.grad_log_prob);
  if (call.entry == kEntryDivergence || call.entry == kEntryFusedDivergence)
    for (const void* found : {p.divergence, p.shift, p.centre, p.mean}) out.push_back(found);
  if (call.entry == kEntryFusedDivergence)
    for (const void* stat : {p.teacher_log_prob, p.teacher_entropy, p.teacher_anchor, p.teacher_log_sum})
      out.push_back(stat);
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

// Few rows, of any of the dtypes.
void make_sizes(Input& in, Call& call, const Library& library) {
  GrpoCall& p = call.p;
  p.dtype = int32_t(in.below(4));
  call.real = p.dtype == kFloat64 ? kFloat64 : kFloat32;
  p.rows = in.below(7);
  p.length = 1 + in.below(4);
  p.vocab = library.vocabs[in.below(12)];
}

void make_tensors(Input& in, Call& call, const Library& library) {
  GrpoCall& p = call.p;
  const int entry = call.entry;
  call.logits = matrix(in, call.arena, p, p.dtype, library.vector);
  const Matrix& logits = call.logits;
  p.logits = logits.first, p.batch_stride = logits.batch_stride, p.row_stride = logits.row_stride;
  const bool writes = is_backward(entry) || (is_fused(entry) && !(library.gradient_optional && in.one_in(4)));
  call.out = in.one_in(3) ? logits
                          : matrix(in, call.arena, p, p.dtype, library.vector, library.vector > 1 ? &logits : nullptr);
  const Matrix& out = call.out;
  if (writes) p.out = out.first, p.out_batch_stride = out.batch_stride, p.out_row_stride = out.row_stride;

  int64_t* ids = static_cast<int64_t*>(call.arena.get(size_t(p.rows) * 8));
  uint8_t* live = static_cast<uint8_t*>(call.arena.get(size_t(p.rows)));
  for (int64_t r = 0; r < p.rows; ++r) {
    live[r] = uint8_t(in.below(3));
    ids[r] = in.one_in(16) ? library.any_id(in) : int64_t(in.byte()) % p.vocab;
    if (live[r] && (ids[r] < 0 || ids[r] >= p.vocab) && call.bad_row < 0) call.bad_row = r;
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
  if (entry < kRowEntries && in.one_in(4)) p.grad_log_prob = nullptr;
  p.flags = static_cast<uint8_t*>(call.arena.get(size_t(p.rows)));

  int32_t* choices[] = {
      &p.surrogate,      &p.kl_estimator,         &p.kl_gradient,         &p.kl_ratio_weighted,
      &p.rollout_scheme, &p.rollout_kl_estimator, &p.rollout_kl_gradient, &p.rollout_kl_ratio_weighted};
  for (int32_t* choice : choices) *choice = in.one_in(16) ? int32_t(in.word()) : int32_t(in.below(8));
  p.divergence_kind = in.one_in(16) ? int32_t(in.word()) : int32_t(in.below(7));
  p.teacher_dtype = p.dtype;
  if (is_pair(entry)) {
    if (library.teacher_of_any_dtype && p.dtype != kFloat64 && in.one_in(2))
      p.teacher_dtype = int32_t(in.one_in(2) ? kBFloat16 : kFloat32);
    const Matrix teacher = matrix(in, call.arena, p, p.teacher_dtype, library.vector);
    p.teacher_logits = teacher.first;
    p.teacher_batch_stride = teacher.batch_stride, p.teacher_row_stride = teacher.row_stride;
    make_numbers(in, call, p.teacher_numbers, in.one_in(4));
    if (in.one_in(4)) p.teacher_temperature = call.reals(in, p.rows);
  }
}

// The bytes of memory that holds a gradient, but for the rows themselves.
std::vector<char> around(const Call& call) {
  const Matrix& m = call.out;
  std::vector<char> bytes(m.start, m.start + m.bytes);
  const int64_t size = int64_t(size_of(call.p.dtype));
  for (int64_t r = 0; r < call.p.rows; ++r) {
    const int64_t at = r / call.p.length * m.batch_stride + r % call.p.length * m.row_stride;
    memset(bytes.data() + (m.first - m.start) + at * size, 0, size_t(call.p.vocab * size));
  }
  return bytes;
}

// What was in memory before a call, to be asked after it.
class Before {
 public:
  // `own`: buffers of the library's that it may write, too.
  Before(const Call& call, std::vector<const void*> own) : call_(call), own_(std::move(own)) {
    for (const void* buffer : written(call)) own_.push_back(buffer);
    if (call.p.out) own_.push_back(call.out.start);
    kept_ = call.arena.contents(own_);
    if (call.p.out) around_ = around(call);
    everything_ = call.arena.contents({});
  }
  // The call was none.
  void require_untouched() const { REQUIRE(everything_ == call_.arena.contents({})); }
  // Nothing but outputs has changed, and dead rows have the gradient 0.
  void require_only_outputs() const {
    REQUIRE(kept_ == call_.arena.contents(own_));
    const GrpoCall& p = call_.p;
    if (!p.out) return;
    REQUIRE(around_ == around(call_));
    const Matrix& m = call_.out;
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t size = int64_t(size_of(p.dtype));
      const char* row = m.first + (r / p.length * m.batch_stride + r % p.length * m.row_stride) * size;
      for (int64_t i = 0; !p.live[r] && i < p.vocab * size; ++i) REQUIRE(row[i] == 0);
    }
  }

 private:
  const Call& call_;
  std::vector<const void*> own_;
  std::vector<char> kept_, around_, everything_;
};

}  // namespace
