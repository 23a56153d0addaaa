#include "cpu/runtime/mapped.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

namespace ktx {
namespace {
constexpr int POPULATE_READ = 22;  // MADV_POPULATE_READ, Linux 5.14; older headers lack the name

uint8_t* align_to_huge_page(void* base) {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(base) + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
}
}  // namespace

// mmap aligns to small pages only, and remap_huge_pages needs addresses aligned to huge pages. So map_file reserves one
// huge page more than the file takes, and maps the file at the first aligned address of the reservation. PROT_WRITE is
// needed because the tensor of a file is writable: a MAP_PRIVATE write gets its own copy of the page and never reaches
// the file.
Mapped map_file(const char* path) {
  const Mapped failed{nullptr, 0, nullptr};
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return failed;
  struct stat info;
  const size_t size = fstat(file, &info) == 0 ? size_t(info.st_size) : 0;
  void* base = size ? mmap(nullptr, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                    : MAP_FAILED;
  void* data = base == MAP_FAILED
      ? MAP_FAILED
      : mmap(align_to_huge_page(base), size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0);
  close(file);
  if (data != MAP_FAILED) return {static_cast<uint8_t*>(data), size, base};
  if (base != MAP_FAILED) munmap(base, size + HUGE_PAGE);
  return failed;
}

void unmap(const Mapped& file) { munmap(file.base, file.size + HUGE_PAGE); }

// Replaces mapped file pages by a copy in huge pages. The page cache of a file has small pages, so only anonymous
// memory can have huge ones. The copy is made elsewhere, in an area with one huge page more for the alignment, and
// mremap puts it at `address` in one atomic step: a reader sees the old page or the equal new one. Then the unused ends
// of the area are unmapped.
bool remap_huge_pages(uint8_t* address, size_t length) {
  const size_t huge_bytes = length / HUGE_PAGE * HUGE_PAGE;
  if (!huge_bytes || address != align_to_huge_page(address)) return false;
  void* base = mmap(nullptr, huge_bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return false;
  uint8_t* copy = align_to_huge_page(base);
  madvise(copy, huge_bytes, MADV_HUGEPAGE);
  std::memcpy(copy, address, huge_bytes);
  const bool moved = mremap(copy, huge_bytes, huge_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, address) != MAP_FAILED;
  if (!moved) {
    munmap(base, huge_bytes + HUGE_PAGE);
    return false;
  }
  const size_t padding = size_t(copy - static_cast<uint8_t*>(base));  // in front of the aligned copy
  if (padding) munmap(base, padding);
  if (padding < HUGE_PAGE) munmap(copy + huge_bytes, HUGE_PAGE - padding);
  return true;
}

// Rounds the range outwards to full pages, because madvise takes those only.
void populate(const void* memory, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) & ~uintptr_t(4095),
                  end = reinterpret_cast<uintptr_t>(memory) + bytes;
  if (end <= begin) return;
  void* from = reinterpret_cast<void*>(begin);
  if (madvise(from, end - begin, POPULATE_READ) != 0) madvise(from, end - begin, MADV_WILLNEED);
}
}  // namespace ktx
