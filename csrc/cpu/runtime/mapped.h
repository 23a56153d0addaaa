// Files as memory, and their way from a file's small pages to huge ones.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ktx {
constexpr size_t HUGE_PAGE = size_t(2) << 20;

struct Mapped {
  uint8_t* data;  // at a multiple of a huge page; null: it could not be done
  size_t size;
  void* base;  // what the mapping lies in
};
Mapped map_file(const char* path);  // private: nothing written there reaches the file
void unmap(const Mapped& file);

// The `length` bytes from `address` on of a mapped file, from now on in memory of their own on huge pages, at the same addresses: whoever reads them
// notices nothing. What is no whole huge page at the end stays. False where nothing could be done.
bool remap_huge_pages(uint8_t* address, size_t length);

// Brings pages in, as the system likes it; what it cannot is done on the first read.
void populate(const void* memory, size_t bytes);
}  // namespace ktx
