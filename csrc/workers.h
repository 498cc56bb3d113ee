// Threads and scratch memory for the kernels.
#pragma once

#include <cstdint>

#include "cpu/mbconv.h"

namespace pynas {

// What a kernel works with during one call: up to so many threads, this one among them, and memory
// that stays with this thread between calls, because fetching it anew from the system costs as
// much as some kernels. Release it with release_scratch.
class CallWorkers {
 public:
  explicit CallWorkers(int64_t threads);
  ~CallWorkers();
  CallWorkers(const CallWorkers&) = delete;
  CallWorkers& operator=(const CallWorkers&) = delete;

  const Workers& get() const { return workers_; }

 private:
  Workers workers_;
};

// Gives the scratch memory of this thread back.
void release_scratch();

// Bytes of scratch memory that this thread keeps.
int64_t scratch_bytes();

}  // namespace pynas
