#include "cpu/runtime/mapped.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

namespace ktx {
namespace {
constexpr int POPULATE_READ = 22;  // MADV_POPULATE_READ, Linux 5.14

uint8_t* aligned(void* base) { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(base) + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1)); }
}  // namespace

Mapped map_file(const char* path) {
  const Mapped nothing{nullptr, 0, nullptr};
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return nothing;
  struct stat about;
  const size_t size = fstat(file, &about) == 0 ? size_t(about.st_size) : 0;
  void* base = size ? mmap(nullptr, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : MAP_FAILED;
  void* data = base == MAP_FAILED ? MAP_FAILED : mmap(aligned(base), size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0);
  close(file);
  if (data != MAP_FAILED) return {static_cast<uint8_t*>(data), size, base};
  if (base != MAP_FAILED) munmap(base, size + HUGE_PAGE);
  return nothing;
}

void unmap(const Mapped& file) { munmap(file.base, file.size + HUGE_PAGE); }

bool remap_huge_pages(uint8_t* address, size_t length) {
  const size_t whole = length / HUGE_PAGE * HUGE_PAGE;
  if (!whole || address != aligned(address)) return false;
  void* base = mmap(nullptr, whole + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return false;
  uint8_t* copy = aligned(base);
  madvise(copy, whole, MADV_HUGEPAGE);
  std::memcpy(copy, address, whole);
  const bool moved = mremap(copy, whole, whole, MREMAP_MAYMOVE | MREMAP_FIXED, address) != MAP_FAILED;
  if (!moved) {
    munmap(base, whole + HUGE_PAGE);
    return false;
  }
  const size_t before = size_t(copy - static_cast<uint8_t*>(base));  // padding for alignment
  if (before) munmap(base, before);
  if (before < HUGE_PAGE) munmap(copy + whole, HUGE_PAGE - before);
  return true;
}

void populate(const void* memory, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) & ~uintptr_t(4095), end = reinterpret_cast<uintptr_t>(memory) + bytes;
  if (end <= begin) return;
  void* from = reinterpret_cast<void*>(begin);
  if (madvise(from, end - begin, POPULATE_READ) != 0) madvise(from, end - begin, MADV_WILLNEED);
}
}  // namespace ktx
