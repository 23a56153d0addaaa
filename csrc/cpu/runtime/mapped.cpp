#include "cpu/runtime/mapped.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

namespace ktx {
namespace {
constexpr int POPULATE_READ = 22;  // MADV_POPULATE_READ, Linux 5.14

uint8_t* aligned(void* room) { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(room) + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1)); }
}  // namespace

Mapped map_whole(const char* path) {
  const Mapped nothing{nullptr, 0, nullptr};
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return nothing;
  struct stat about;
  const size_t size = fstat(file, &about) == 0 ? size_t(about.st_size) : 0;
  void* room = size ? mmap(nullptr, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : MAP_FAILED;
  void* data = room == MAP_FAILED ? MAP_FAILED : mmap(aligned(room), size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0);
  close(file);
  if (data != MAP_FAILED) return {static_cast<uint8_t*>(data), size, room};
  if (room != MAP_FAILED) munmap(room, size + HUGE_PAGE);
  return nothing;
}

void unmap(const Mapped& file) { munmap(file.room, file.size + HUGE_PAGE); }

bool to_memory(uint8_t* place, size_t length) {
  const size_t whole = length / HUGE_PAGE * HUGE_PAGE;
  if (!whole || place != aligned(place)) return false;
  void* room = mmap(nullptr, whole + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return false;
  uint8_t* copy = aligned(room);
  madvise(copy, whole, MADV_HUGEPAGE);
  std::memcpy(copy, place, whole);
  const bool moved = mremap(copy, whole, whole, MREMAP_MAYMOVE | MREMAP_FIXED, place) != MAP_FAILED;
  if (!moved) {
    munmap(room, whole + HUGE_PAGE);
    return false;
  }
  const size_t before = size_t(copy - static_cast<uint8_t*>(room));  // what was only there to be aligned
  if (before) munmap(room, before);
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
