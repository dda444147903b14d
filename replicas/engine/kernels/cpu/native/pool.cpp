#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace millrace {
namespace {

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Tens of microseconds: longer than a phase is uneven, shorter than another program's turn on the core.
constexpr int kSpins = 2000;

void wait_while_equal(const std::atomic<uint32_t>& word, uint32_t old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (word.load(std::memory_order_acquire) != old) return;
    relax();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

// Where this thread may run. Hints: what fails changes nothing, as on a machine with more processors than a mask names.
#if defined(__linux__)
using Mask = cpu_set_t;
bool get_mask(Mask& mask) { return sched_getaffinity(0, sizeof mask, &mask) == 0; }
void set_mask(const Mask& mask) { sched_setaffinity(0, sizeof mask, &mask); }
Mask mask_of(const std::vector<int>& processors) {
  Mask mask;
  CPU_ZERO(&mask);
  for (int processor : processors)
    if (processor < CPU_SETSIZE) CPU_SET(processor, &mask);
  return mask;
}
#else
struct Mask {};
bool get_mask(Mask&) { return false; }
void set_mask(const Mask&) {}
Mask mask_of(const std::vector<int>&) { return {}; }
#endif

}  // namespace

Pool::Pool(int num_threads, std::vector<int> processors) : size_(num_threads), processors_(std::move(processors)) {
  for (auto& set : claims_) set = std::make_unique<Claims[]>(num_threads);
  phase_of_ = std::make_unique<PhaseNumber[]>(num_threads);
  threads_.reserve(num_threads - 1);
  for (int thread = 1; thread < num_threads; ++thread) threads_.emplace_back([this, thread] { serve(thread); });
}

Pool::~Pool() {
  is_closing_ = true;
  run_number_.fetch_add(1);
  run_number_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Pool::run(const std::function<void(int)>& work) {
  Mask before;
  const bool moves = has_own_processors() && get_mask(before);
  if (moves) set_mask(mask_of(processors_of(0)));
  work_ = &work;
  run_number_.fetch_add(1, std::memory_order_release);
  run_number_.notify_all();
  work(0);
  barrier(0);
  if (moves) set_mask(before);
}

void Pool::serve(int thread) {
  if (Mask before; has_own_processors() && get_mask(before)) set_mask(mask_of(processors_of(thread)));
  for (uint32_t seen = 0;; ++seen) {
    wait_while_equal(run_number_, seen);
    if (is_closing_) return;
    (*work_)(thread);
    barrier(thread);
  }
}

std::vector<int> Pool::processors_of(int thread) const {
  const int count = int(processors_.size());
  return {processors_.begin() + share_begin(count, thread), processors_.begin() + share_begin(count, thread + 1)};
}

void Pool::barrier(int thread) {
  const uint64_t phase = phase_of_[thread].value++;
  const uint32_t generation = generation_.load(std::memory_order_acquire);
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < size())
    return wait_while_equal(generation_, generation);
  // The last one: nobody touches the set two phases ahead before the generation moves.
  for (int i = 0; i < size(); ++i) claims_[(phase + 2) % kNumClaimSets][i].taken.store(0, std::memory_order_relaxed);
  num_arrived_.store(0, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
}

}  // namespace millrace
