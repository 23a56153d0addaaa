// Memory-mapped files, and moving them from page cache pages to huge pages.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ktx {
constexpr size_t HUGE_PAGE = size_t(2) << 20;

struct Mapped {
  uint8_t* data;  // aligned to a huge page; null: mapping failed
  size_t size;
  void* base;  // the reservation that contains the mapping
};
Mapped map_file(const char* path);  // MAP_PRIVATE: writes do not reach the file
void unmap(const Mapped& file);

// Copies `length` bytes of a mapped file to anonymous huge pages and remaps them to the same addresses, so that readers
// are not disturbed. Weights in huge pages cost fewer TLB misses. The bytes after the last full huge page stay as they
// are. Returns false if the system refuses.
bool remap_huge_pages(uint8_t* address, size_t length);

// Populates the page tables of `memory` ahead of its first read, with MADV_POPULATE_READ where the kernel has it; an
// older kernel reads the file ahead, and the first read of each page populates its table entry.
void populate(const void* memory, size_t bytes);
}  // namespace ktx
