// SPDX-License-Identifier: Apache-2.0
#ifndef HEADINFER_TESTS_GUARDED_H
#define HEADINFER_TESTS_GUARDED_H

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

// Memory that ends where a page begins that nobody may read, with NaN in front of it: reading past
// a tensor ends the run, reading before it shows in the result.
class Guarded {
 public:
  explicit Guarded(int64_t nbytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t whole = (static_cast<size_t>(nbytes) + page - 1) / page * page;
    length_ = whole + page;
    void *made = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) std::abort();
    start_ = static_cast<char *>(made);
    std::memset(start_, 0xff, whole);
    if (mprotect(start_ + whole, page, PROT_NONE) != 0) std::abort();
    data_ = start_ + whole - nbytes;
  }
  Guarded(const Guarded &) = delete;
  Guarded &operator=(const Guarded &) = delete;
  ~Guarded() { munmap(start_, length_); }
  char *get() const { return data_; }

 private:
  char *start_, *data_;
  size_t length_;
};

}  // namespace

#endif
