// The vocabulary kernels over rows, compiled once for each instruction set (GRPO_ISA_NAME).
// Everything but the table below has internal linkage: a function shared between the copies would run
// with whichever instruction set the linker happened to keep.
#include "../common/terms.h"
#include "api.h"
#include "reverse_kl.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Typed view of the parameters: T is the logits' element, V the vectors that compute on it.
template <class T, class V>
struct Call {
  using scalar = typename V::scalar;
  GrpoCpuParams* p;
  LogitMap<V> shared;  // of the rows that have no temperature of their own

  explicit Call(GrpoCpuParams* params) : p(params), shared(grpo::logit_map(numbers())) {}

  const scalar* numbers() const { return static_cast<const scalar*>(p->numbers); }
  static scalar at(const void* values, int64_t r) { return static_cast<const scalar*>(values)[r]; }
  static void put(void* values, int64_t r, double x) { static_cast<scalar*>(values)[r] = scalar(x); }
  LogitMap<V> map_of(int64_t r) const {
    return p->temperature ? grpo::logit_map(numbers(), at(p->temperature, r)) : shared;
  }
  int64_t target(int64_t r) const { return p->token_ids[r]; }
  const T* row(int64_t r) const {
    return static_cast<const T*>(p->logits) + r / p->length * p->batch_stride + r % p->length * p->row_stride;
  }
  T* out_row(int64_t r) const {
    return static_cast<T*>(p->out) + r / p->length * p->out_batch_stride + r % p->length * p->out_row_stride;
  }
  void fill(int64_t r, double x) const {
    T* out = out_row(r);
    if (x == 0) {
      memset(out, 0, p->vocab * sizeof(T));
    } else {
      for (int64_t j = 0; j < p->vocab; ++j) store_one<V>(out + j, scalar(x));
    }
  }
  RowStats stats(int64_t r, const LogitMap<V>& map) const {
    if (map.softcap) return row_stats<V, true, false>(row(r), p->vocab, target(r), map, nullptr, nullptr);
    return row_stats<V, false, false>(row(r), p->vocab, target(r), map, nullptr, nullptr);
  }
  void put_stats(int64_t r, const RowStats& stats) const {
    put(p->log_prob, r, stats.log_prob);
    put(p->entropy, r, stats.entropy);
    put(p->anchor, r, stats.anchor);
    put(p->log_sum, r, stats.log_sum);
  }
  // Writes the token's terms; returns d loss / d log_prob.
  scalar slope(int64_t r) const {
    const grpo::TokenTerms<scalar> terms = grpo::terms_at<scalar>(*p, r);
    grpo::put_terms<scalar>(*p, r, terms);
    return terms.slope;
  }
  // From the rounded outputs, so that one pass and two passes write the same bits where both come here.
  void gradient(int64_t r, const LogitMap<V>& map, double g, double h) const {
    if (g == 0 && h == 0) return fill(r, 0);
    const RowStats stats{at(p->log_prob, r), at(p->entropy, r), at(p->anchor, r), at(p->log_sum, r), NAN};
    if (stats.log_sum != stats.log_sum || g != g || h != h) return fill(r, NAN);
    if (map.softcap) {
      gradient_from_logits<V, true>(row(r), p->vocab, target(r), map, stats, g, h, out_row(r));
    } else {
      gradient_from_logits<V, false>(row(r), p->vocab, target(r), map, stats, g, h, out_row(r));
    }
  }
};

// Where a row's exponentials wait for the second sweep: in place of the gradient if they are of one type.
inline float* exps_of(float* out, float*) { return out; }
inline double* exps_of(double* out, double*) { return out; }
template <class T>
inline float* exps_of(T*, float* scratch) {
  return scratch;
}

template <class T, class V>
struct LogProbs : Call<T, V> {
  using Call<T, V>::Call;
  void live(int64_t r, typename V::scalar*) const { this->put_stats(r, this->stats(r, this->map_of(r))); }
  void dead(int64_t r) const { this->put_stats(r, {0, 0, 0, 0, 0}); }
};

template <class T, class V>
struct LogProbsBackward : Call<T, V> {
  using Call<T, V>::Call;
  void live(int64_t r, typename V::scalar*) const {
    const GrpoCpuParams& p = *this->p;
    this->gradient(r, this->map_of(r), p.grad_log_prob ? this->at(p.grad_log_prob, r) : 0,
                   p.grad_entropy ? this->at(p.grad_entropy, r) : 0);
  }
  void dead(int64_t r) const { this->fill(r, 0); }
};

template <class T, class V>
struct FusedLoss : Call<T, V> {
  using scalar = typename V::scalar;
  using Call<T, V>::Call;

  void live(int64_t r, scalar* scratch) const {
    const GrpoCpuParams& p = *this->p;
    const LogitMap<V> map = this->map_of(r);
    const bool keep = p.out && !p.entropy_weight && !map.softcap;
    scalar* largest = scratch;
    scalar* exps = keep ? exps_of(this->out_row(r), scratch + room_for_largest(p.vocab)) : nullptr;
    const RowStats stats = keep ? row_stats<V, false, true>(this->row(r), p.vocab, this->target(r), map, exps, largest)
                                : this->stats(r, map);
    this->put_stats(r, stats);
    const double g = this->slope(r), h = p.entropy_weight ? -double(this->at(p.entropy_weight, r)) : 0;
    if (!p.out) return;
    const double scale = this->numbers()[grpo::kGradScale];
    if (keep && g != 0 && g == g && stats.log_sum == stats.log_sum) {
      gradient_from_exps<V>(exps, largest, stats, p.vocab, this->target(r), map, g * scale, this->out_row(r));
    } else {
      this->gradient(r, map, g * scale, h * scale);
    }
  }

  void dead(int64_t r) const {
    this->put_stats(r, {0, 0, 0, 0, 0});
    grpo::put_terms<scalar>(*this->p, r, {});
    if (this->p->out) this->fill(r, 0);
  }
};

// A row beside its teacher's.
template <class T, class V>
struct Pair : Call<T, V> {
  using scalar = typename V::scalar;
  LogitMap<V> teacher_shared;

  explicit Pair(GrpoCpuParams* params) : Call<T, V>(params), teacher_shared(grpo::logit_map(teacher_numbers())) {}

  const scalar* teacher_numbers() const { return static_cast<const scalar*>(this->p->teacher_numbers); }
  scalar mix() const { return this->numbers()[grpo::kDivergenceMix]; }
  PairRow<V> policy_row(int64_t r) const { return {this->row(r), this->p->dtype, this->map_of(r)}; }
  PairRow<V> teacher_row(int64_t r) const {
    const GrpoCpuParams& p = *this->p;
    const int64_t offset = r / p.length * p.teacher_batch_stride + r % p.length * p.teacher_row_stride;
    const int64_t size = p.teacher_dtype == kFloat64 ? 8 : p.teacher_dtype == kFloat32 ? 4 : 2;
    const void* temperature = p.teacher_temperature;
    return {static_cast<const char*>(p.teacher_logits) + offset * size, p.teacher_dtype,
            temperature ? grpo::logit_map(teacher_numbers(), this->at(temperature, r)) : teacher_shared};
  }
  void read_stats(int64_t r, PairRow<V>& policy, PairRow<V>& teacher) const {
    const GrpoCpuParams& p = *this->p;
    policy.anchor = this->at(p.anchor, r);
    policy.log_sum = this->at(p.log_sum, r);
    teacher.anchor = this->at(p.teacher_anchor, r);
    teacher.log_sum = this->at(p.teacher_log_sum, r);
  }
  bool takes_two_sweeps(const PairRow<V>& policy, const PairRow<V>& teacher) const {
    const bool plain = policy.dtype == teacher.dtype && !policy.map.softcap && !teacher.map.softcap;
    return plain && this->p->divergence_kind == grpo::kReverseKL;
  }
  void put_divergence(int64_t r, const DivergenceStats& stats) const {
    this->put(this->p->divergence, r, stats.divergence);
    this->put(this->p->shift, r, stats.shift);
    this->put(this->p->centre, r, stats.centre);
    this->put(this->p->mean, r, stats.mean);
  }
  // From the rounded outputs, as Call::gradient; `correction` and `parts` are divergence_of's.
  void pair_gradient(int64_t r, const PairRow<V>& policy, const PairRow<V>& teacher, double g, double h, double w,
                     double correction, const PairParts<V>& parts) const {
    const GrpoCpuParams& p = *this->p;
    if (w == 0) return this->gradient(r, policy.map, g, h);
    const DivergenceStats stats{this->at(p.divergence, r), this->at(p.shift, r), this->at(p.centre, r),
                                this->at(p.mean, r), correction};
    const double sum = stats.shift + stats.mean + g + h + w;
    if (sum != sum) return this->fill(r, NAN);
    ::pair_gradient(policy, teacher, p.vocab, p.divergence_kind, mix(), stats, pair_slopes(r, policy, g, h, w),
                    this->target(r), parts, this->out_row(r));
  }
  PairSlopes<V> pair_slopes(int64_t r, const PairRow<V>& policy, double g, double h, double w) const {
    const GrpoCpuParams& p = *this->p;
    return {w, grpo::gradient_terms<scalar>(this->at(p.log_prob, r), this->at(p.entropy, r), policy.anchor,
                                            policy.log_sum, g, h, policy.map.derivative)};
  }
};

// A thread's scratch: the largest values of both rows, one a segment, and what is kept of their columns.
template <class scalar>
struct Room {
  scalar *largest, *teacher_largest, *first, *second;

  Room(scalar* scratch, int64_t vocab)
      : largest(scratch),
        teacher_largest(largest + room_for_largest(vocab)),
        first(teacher_largest + room_for_largest(vocab)),
        second(first + room_for_exps(vocab)) {}
};

template <class T, class V>
struct Divergence : Pair<T, V> {
  using scalar = typename V::scalar;
  using Pair<T, V>::Pair;

  void live(int64_t r, scalar* scratch) const {
    const GrpoCpuParams& p = *this->p;
    const Room<scalar> room(scratch, p.vocab);
    PairRow<V> policy = this->policy_row(r), teacher = this->teacher_row(r);
    this->read_stats(r, policy, teacher);
    if (this->takes_two_sweeps(policy, teacher) && policy.log_sum == policy.log_sum) {
      // As one pass: the first of its sweeps.
      ReverseSums<V, T> sums(policy, teacher, room.first);
      row_stats<V, false, true>(this->row(r), p.vocab, -1, policy.map, room.first, room.largest, sums);
      const DivergenceStats found = sums.divergence(policy, teacher);
      if (sums.is_exact(found.divergence)) return this->put_divergence(r, found);
    }
    find_largest(policy, p.vocab, room.largest);
    find_largest(teacher, p.vocab, room.teacher_largest);
    policy.largest = room.largest;
    teacher.largest = room.teacher_largest;
    const PairParts<V> nobodys;
    this->put_divergence(r, divergence_of(policy, teacher, p.vocab, p.divergence_kind, this->mix(), nobodys));
  }
  void dead(int64_t r) const { this->put_divergence(r, {0, 0, 0, 0, 0}); }
};

template <class T, class V>
struct DivergenceBackward : Pair<T, V> {
  using Pair<T, V>::Pair;

  void live(int64_t r, typename V::scalar*) const {
    const GrpoCpuParams& p = *this->p;
    PairRow<V> policy = this->policy_row(r), teacher = this->teacher_row(r);
    this->read_stats(r, policy, teacher);
    this->pair_gradient(r, policy, teacher, p.grad_log_prob ? this->at(p.grad_log_prob, r) : 0,
                        p.grad_entropy ? this->at(p.grad_entropy, r) : 0, this->at(p.grad_divergence, r), 0,
                        PairParts<V>());
  }
  void dead(int64_t r) const { this->fill(r, 0); }
};

template <class T, class V>
struct FusedDivergence : Pair<T, V> {
  using scalar = typename V::scalar;
  using Pair<T, V>::Pair;

  // The loss's slopes in a row's log-prob, entropy and divergence.
  struct Slopes {
    double g, h, w;
  };

  void live(int64_t r, scalar* scratch) const {
    const Room<scalar> room(scratch, this->p->vocab);
    if (!two_sweeps(r, room)) three_sweeps(r, room);
  }
  void three_sweeps(int64_t r, const Room<scalar>& room) const {
    const GrpoCpuParams& p = *this->p;
    PairRow<V> policy = this->policy_row(r), teacher = this->teacher_row(r);
    const int64_t target = this->target(r);
    const PairParts<V> parts{room.first, room.second};
    this->put_stats(r, kept_stats(policy, p.vocab, target, room.largest, parts.p));
    put_teacher_stats(r, kept_stats(teacher, p.vocab, target, room.teacher_largest, parts.relative));
    this->read_stats(r, policy, teacher);
    const DivergenceStats stats = divergence_of(policy, teacher, p.vocab, p.divergence_kind, this->mix(), parts);
    this->put_divergence(r, stats);
    const Slopes slopes = put_terms(r);
    if (p.out) this->pair_gradient(r, policy, teacher, slopes.g, slopes.h, slopes.w, stats.correction, parts);
  }
  // False: nothing was written, it would not be exact.
  bool two_sweeps(int64_t r, const Room<scalar>& room) const {
    const GrpoCpuParams& p = *this->p;
    PairRow<V> policy = this->policy_row(r), teacher = this->teacher_row(r);
    if (!this->takes_two_sweeps(policy, teacher)) return false;
    const int64_t target = this->target(r);
    ReverseSums<V, T> sums(policy, teacher, room.first);
    const RowStats stats =
        row_stats<V, false, true>(this->row(r), p.vocab, target, policy.map, room.first, room.largest, sums);
    policy.anchor = scalar(stats.anchor);
    teacher.anchor = sums.anchor();
    const DivergenceStats found = sums.divergence(policy, teacher);
    if (stats.log_sum != stats.log_sum || !sums.is_exact(found.divergence)) return false;
    this->put_stats(r, stats);
    put_teacher_stats(r, sums.teacher(stats, found.shift, target));
    this->put_divergence(r, found);
    const Slopes slopes = put_terms(r);
    if (!p.out) return true;
    this->read_stats(r, policy, teacher);
    const double sum = slopes.g + slopes.h + slopes.w;
    if (slopes.w == 0 || sum != sum) {
      this->pair_gradient(r, policy, teacher, slopes.g, slopes.h, slopes.w, 0, PairParts<V>());
      return true;
    }
    policy.largest = room.largest;
    policy.exps = room.first;
    const PairSlopes<V> pair = this->pair_slopes(r, policy, slopes.g, slopes.h, slopes.w);
    const double of_relative = slopes.w * policy.map.derivative, d_target = sums.d_at(target);
    const PairGradient<V> g = pair_gradient_of(policy, pair, -of_relative * sums.mean());
    double at_target = pair.terms.target;
    if (::fabs(d_target) < INFINITY) at_target += of_relative * ::exp(stats.log_prob) * (d_target - sums.mean());
    const auto gradient =
        g.linear != 0 || sums.impossible() ? reverse_gradient<V, true, T> : reverse_gradient<V, false, T>;
    gradient(policy, teacher, p.vocab, stats, sums.constant(), g, this->out_row(r));
    store_one<V>(this->out_row(r) + target, scalar(at_target));
    return true;
  }
  void dead(int64_t r) const {
    this->put_stats(r, {0, 0, 0, 0, 0});
    put_teacher_stats(r, {0, 0, 0, 0, 0});
    this->put_divergence(r, {0, 0, 0, 0, 0});
    grpo::put_terms<scalar>(*this->p, r, {});
    if (this->p->out) this->fill(r, 0);
  }
  Slopes put_terms(int64_t r) const {
    const GrpoCpuParams& p = *this->p;
    const double scale = this->numbers()[grpo::kGradScale], g = this->slope(r);
    const double h = p.entropy_weight ? -double(this->at(p.entropy_weight, r)) : 0;
    return {g * scale, h * scale, this->at(p.grad_divergence, r) * scale};
  }
  void put_teacher_stats(int64_t r, const RowStats& stats) const {
    this->put(this->p->teacher_log_prob, r, stats.log_prob);
    this->put(this->p->teacher_entropy, r, stats.entropy);
    this->put(this->p->teacher_anchor, r, stats.anchor);
    this->put(this->p->teacher_log_sum, r, stats.log_sum);
  }
};

// Rows over threads; which thread takes a row changes no bit of it.
template <class Kernel, class scalar>
int32_t over_rows(GrpoCpuParams* p) {
  for (int64_t r = 0; r < p->rows; ++r) {
    if ((!p->live || p->live[r]) && (p->token_ids[r] < 0 || p->token_ids[r] >= p->vocab)) {
      p->bad_row = r;
      return kTokenIdOutOfRange;
    }
  }
  const Kernel kernel(p);
  const int64_t grain = 32768 / p->vocab + 1;  // rows handed out at a time: 32k columns of work
  const int64_t chunks = (p->rows + grain - 1) / grain;
#ifdef _OPENMP
#pragma omp parallel num_threads(chunks < p->threads ? int(chunks) : p->threads) if (chunks > 1)
#endif
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    const FlushDenormals guard;
    scalar* scratch = static_cast<scalar*>(p->scratch) + thread * p->scratch_stride;
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t end = (chunk + 1) * grain < p->rows ? (chunk + 1) * grain : p->rows;
      for (int64_t r = chunk * grain; r < end; ++r) {
        if (!p->live || p->live[r]) {
          kernel.live(r, scratch);
        } else {
          kernel.dead(r);
        }
      }
    }
  }
  return kOk;
}

template <template <class, class> class Kernel>
int32_t dispatch(GrpoCpuParams* p) {
  switch (p->dtype) {
    case kFloat32: return over_rows<Kernel<float, Float>, float>(p);
    case kFloat64: return over_rows<Kernel<double, Double>, double>(p);
    case kBFloat16: return over_rows<Kernel<BFloat16, Float>, float>(p);
    case kFloat16: return over_rows<Kernel<Float16, Float>, float>(p);
    default: return kUnknownDtype;
  }
}

template <template <class, class> class Kernel>
int32_t dispatch_pair(GrpoCpuParams* p) {
  if ((p->dtype == kFloat64) != (p->teacher_dtype == kFloat64)) return kUnknownDtype;
  return dispatch<Kernel>(p);
}

}  // namespace

#define GRPO_JOIN_(a, b) a##b
#define GRPO_JOIN(a, b) GRPO_JOIN_(a, b)

extern const GrpoCpuKernels GRPO_JOIN(grpo_cpu_kernels_, GRPO_ISA_NAME);
const GrpoCpuKernels GRPO_JOIN(grpo_cpu_kernels_, GRPO_ISA_NAME) = {
    dispatch<LogProbs>,        dispatch<LogProbsBackward>,        dispatch<FusedLoss>,
    dispatch_pair<Divergence>, dispatch_pair<DivergenceBackward>, dispatch_pair<FusedDivergence>};
