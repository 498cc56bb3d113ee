#include "workers.h"

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace pynas {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kBlockUnit = 2 << 20;  // a large page

#ifdef __SANITIZE_ADDRESS__
constexpr bool kEachAlone = true;  // so that the sanitizer sees where a piece ends
#else
constexpr bool kEachAlone = false;
#endif

// Memory that is handed out piece by piece and taken back all at once.
class Arena {
 public:
  ~Arena() { release(); }

  void* take(int64_t bytes) {
    if (kEachAlone) {
      add_block(bytes);
      return blocks_.back().data;
    }
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
    if (blocks_.empty() || used_ + bytes > blocks_.back().bytes) {
      add_block(bytes);
    }
    void* piece = blocks_.back().data + used_;
    used_ += bytes;
    return piece;
  }

  // Several blocks become one that would have held all of the call.
  void take_back() {
    used_ = 0;
    if (kEachAlone) return release();
    if (blocks_.size() <= 1) return;
    const int64_t total = bytes();
    release();
    try {
      add_block(total);
    } catch (const std::bad_alloc&) {
      release();  // the next call asks piece by piece again
    }
  }

  void release() {
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
    used_ = 0;
  }

  int64_t bytes() const {
    int64_t total = 0;
    for (const Block& block : blocks_) total += block.bytes;
    return total;
  }

 private:
  struct Block {
    char* data;
    int64_t bytes;
  };

  void add_block(int64_t bytes) {
    blocks_.reserve(blocks_.size() + 1);
    if (!kEachAlone) bytes = (bytes + kBlockUnit - 1) / kBlockUnit * kBlockUnit;
    void* data = nullptr;
    if (posix_memalign(&data, kEachAlone ? kAlignment : kBlockUnit, static_cast<size_t>(bytes)) !=
        0)
      throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // A wish: fewer translation misses.
    if (!kEachAlone) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
    blocks_.push_back({static_cast<char*>(data), bytes});
    used_ = 0;
  }

  std::vector<Block> blocks_;
  int64_t used_ = 0;
};

thread_local Arena arena;

// Threads that wait for work. Tasks are dealt as threads become free; each task is done once.
class Pool {
 public:
  using Task = void (*)(void* context, int64_t index, int64_t worker);

  // False where the pool is busy with another caller.
  bool run(int64_t threads, int64_t tasks, Task task, void* context) {
    const std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
    if (!only.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(state_);
      while (static_cast<int64_t>(threads_.size()) < threads - 1) {
        const int64_t worker = static_cast<int64_t>(threads_.size()) + 1;
        const uint64_t seen = round_;
        try {
          threads_.emplace_back([this, worker, seen] { serve(worker, seen); });
        } catch (const std::system_error&) {  // the system has no more: results are the same
          threads = static_cast<int64_t>(threads_.size()) + 1;
        }
      }
      job_ = {task, context, tasks, threads};
      next_.store(0, std::memory_order_relaxed);
      working_ = threads - 1;
      ++round_;
      announced_.store(round_, std::memory_order_release);
    }
    begin_.notify_all();
    deal(job_, 0);
    for (int spin = 0; spin < kSpins && left() > 0; ++spin) pause();
    std::unique_lock<std::mutex> lock(state_);
    done_.wait(lock, [this] { return working_ == 0; });
    return true;
  }

 private:
  struct Job {
    Task task;
    void* context;
    int64_t tasks, threads;
  };
  static constexpr int kSpins = 2000;  // some tens of microseconds: parts follow each other closely

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  int64_t left() {
    const std::lock_guard<std::mutex> lock(state_);
    return working_;
  }

  void deal(const Job& job, int64_t worker) {
    for (int64_t i = next_.fetch_add(1); i < job.tasks; i = next_.fetch_add(1)) {
      job.task(job.context, i, worker);
    }
  }

  [[noreturn]] void serve(int64_t worker, uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && announced_.load(std::memory_order_acquire) == seen;
           ++spin) {
        pause();
      }
      Job job;
      {
        std::unique_lock<std::mutex> lock(state_);
        begin_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        job = job_;
      }
      if (worker >= job.threads) continue;
      deal(job, worker);
      const std::lock_guard<std::mutex> lock(state_);
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_, state_;
  std::condition_variable begin_, done_;
  std::vector<std::thread> threads_;
  Job job_{};
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> announced_{0};
  int64_t working_ = 0;
  uint64_t round_ = 0;
};

// Lives as long as the process: its threads never end. A forked child has none of them, and makes
// a pool of its own.
std::atomic<Pool*> pool{nullptr};
std::once_flag watching;

Pool& the_pool() {
  std::call_once(watching, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
  Pool* now = pool.load();
  if (!now) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(now, fresh)) return *fresh;
    delete fresh;
  }
  return *now;
}

void* take(void*, int64_t bytes) { return arena.take(bytes); }

void run(void* self, int64_t tasks, Pool::Task task, void* context) {
  const auto threads = static_cast<const Workers*>(self)->count;
  const int64_t useful = threads < tasks ? threads : tasks;
  if (useful > 1 && the_pool().run(useful, tasks, task, context)) return;
  for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
}

}  // namespace

CallWorkers::CallWorkers(int64_t threads)
    : workers_{threads < 1 ? 1 : threads, &workers_, take, run} {}

CallWorkers::~CallWorkers() { arena.take_back(); }

void release_scratch() { arena.release(); }

int64_t scratch_bytes() { return arena.bytes(); }

}  // namespace pynas
