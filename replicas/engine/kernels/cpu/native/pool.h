// Threads that share the tasks of one phase after another. They spin for a moment between phases and steps, because a
// step has hundreds of phases of microseconds; then they sleep, so that an idle engine costs nothing.
//
// Each thread keeps to its own share of the processors. Left to the kernel, two threads that wake each other may end up
// on one processor and take turns there while the other idles: alternating, they look like one busy thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace millrace {

class Pool {
 public:
  // `processors`: their numbers, neighbours (two hyperthreads of a core) side by side; empty: the kernel chooses.
  Pool(int num_threads, std::vector<int> processors);
  ~Pool();
  Pool(const Pool&) = delete;

  int size() const { return size_; }

  // Runs work(thread) on every thread, the caller being thread 0; returns when all have returned. The caller keeps to
  // its processors only meanwhile.
  void run(const std::function<void(int)>& work);

  // For work run by `run`, called by all of its threads with the same arguments: runs task(i) for every i < count, each
  // once, then waits for the others. A thread takes its own share in order, then what others have not begun.
  template <class Task>
  void phase(int thread, int count, Task&& task) {
    const int num_threads = size();
    Claims* claims = claims_[phase_of_[thread].value % kNumClaimSets].get();
    for (int turn = 0; turn < num_threads; ++turn) {
      const int owner = (thread + turn) % num_threads;
      const int end = share_begin(count, owner + 1);
      const int begin = share_begin(count, owner);
      for (int i; (i = begin + claims[owner].taken.fetch_add(1, std::memory_order_relaxed)) < end;) task(i);
    }
    barrier(thread);
  }

 private:
  struct alignas(64) Claims {
    std::atomic<int> taken{0};
  };
  struct alignas(64) PhaseNumber {
    uint64_t value = 0;
  };
  static constexpr int kNumClaimSets = 3;  // this phase's, the next one's, and the one that is being cleared

  bool has_own_processors() const { return size() > 1 && size() <= int(processors_.size()); }
  std::vector<int> processors_of(int thread) const;
  int share_begin(int count, int owner) const { return int(int64_t(count) * owner / size()); }
  void barrier(int thread);
  void serve(int thread);

  // Before `threads_`, which read both from their first moment.
  const int size_;
  const std::vector<int> processors_;
  std::vector<std::thread> threads_;
  std::unique_ptr<Claims[]> claims_[kNumClaimSets];
  std::unique_ptr<PhaseNumber[]> phase_of_;
  alignas(64) std::atomic<int> num_arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> run_number_{0};
  std::atomic<bool> is_closing_{false};
  const std::function<void(int)>* work_ = nullptr;
};

}  // namespace millrace
