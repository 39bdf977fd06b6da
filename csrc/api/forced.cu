#include "api/forced.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

namespace adder2d {
namespace {

char const* sentence(char const* format, ...) __attribute__((format(printf, 1, 2)));
char const* sentence(char const* format, ...) {
  static thread_local char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  return text;
}

std::vector<std::string> split(char const* text) {
  std::vector<std::string> parts(1);
  for (; *text != 0; ++text) {
    if (*text == ':') {
      parts.emplace_back();
    } else {
      parts.back() += *text;
    }
  }
  return parts;
}

// Whether `text` is a whole number of least .. most.
bool read_number(std::string const& text, int32_t least, int32_t most, int32_t* number) {
  if (text.empty() || text.size() > 10 || text.find_first_not_of("0123456789") != std::string::npos) return false;
  long long const value = atoll(text.c_str());
  *number = static_cast<int32_t>(value);
  return value >= least && value <= most;
}

std::string list(char const* const* names, int32_t count) {
  std::string text;
  for (int32_t i = 0; i < count; ++i) text += std::string(i > 0 ? ", " : "") + names[i];
  return text;
}

constexpr int32_t kMaxFullTiles = 0x7fffffff;

// The fields of a Forced in 64 bits, all zeros for none: family + 1, tile + 1, splits, packed + 1, full_tiles + 1.
uint64_t encode(Forced const& forced) {
  if (forced.family < 0) return 0;
  TileForce const& tile = forced.tile;
  return static_cast<uint64_t>(forced.family + 1) | static_cast<uint64_t>(tile.tile + 1) << 8 |
         static_cast<uint64_t>(tile.splits) << 16 | static_cast<uint64_t>(tile.packed + 1) << 24 |
         static_cast<uint64_t>(int64_t{tile.full_tiles} + 1) << 32;
}

}  // namespace

Forced ForcedChoice::get() const {
  Forced forced;
  uint64_t const bits = bits_.load(std::memory_order_relaxed);
  if (bits == 0) return forced;
  forced.family = static_cast<int32_t>(bits & 0xff) - 1;
  forced.tile.tile = static_cast<int32_t>(bits >> 8 & 0xff) - 1;
  forced.tile.splits = static_cast<int32_t>(bits >> 16 & 0xff);
  forced.tile.packed = static_cast<int32_t>(bits >> 24 & 0xff) - 1;
  forced.tile.full_tiles = static_cast<int32_t>(static_cast<int64_t>(bits >> 32) - 1);
  return forced;
}

char const* ForcedChoice::set(char const* text, FamilyNames const* const* families, int32_t count) {
  Forced forced;
  if (text != nullptr && *text != 0) {
    std::vector<std::string> const parts = split(text);
    if (parts.size() > 5) return sentence("'%s' has more than family:tile:splits:full_tiles:packed", text);
    std::vector<char const*> names;
    for (int32_t i = 0; i < count; ++i) {
      names.push_back(families[i]->name);
      if (parts[0] == families[i]->name) forced.family = i;
    }
    if (forced.family < 0)
      return sentence("'%s' is not a kernel family: choose one of %s", parts[0].c_str(),
                      list(names.data(), count).c_str());
    FamilyNames const& family = *families[forced.family];
    if (parts.size() > 1 && !parts[1].empty()) {
      for (int32_t i = 0; i < family.tile_count; ++i)
        if (parts[1] == family.tiles[i]) forced.tile.tile = i;
      if (family.tile_count == 0) return sentence("%s has no tiles, got '%s'", family.name, parts[1].c_str());
      if (forced.tile.tile < 0)
        return sentence("'%s' is not a tile of %s: choose one of %s", parts[1].c_str(), family.name,
                        list(family.tiles, family.tile_count).c_str());
    }
    if (parts.size() > 2 && !parts[2].empty() && !read_number(parts[2], 1, kMaxSplits, &forced.tile.splits))
      return sentence("splits must be a number of 1 to %d, got '%s'", kMaxSplits, parts[2].c_str());
    if (parts.size() > 3 && !parts[3].empty() && !read_number(parts[3], 0, kMaxFullTiles, &forced.tile.full_tiles))
      return sentence("full_tiles must be a number of 0 to %d, got '%s'", kMaxFullTiles, parts[3].c_str());
    if (parts.size() > 4 && !parts[4].empty()) {
      if (parts[4] != "packed" && parts[4] != "unpacked")
        return sentence("the last field must be packed or unpacked, got '%s'", parts[4].c_str());
      forced.tile.packed = parts[4] == "packed";
    }
  }
  bits_.store(encode(forced), std::memory_order_relaxed);
  return nullptr;
}

char const* describe_choice(FamilyNames const& family, TileConfig const& config) {
  if (family.tile_count == 0) return sentence("%s", family.name);
  // A family that does not split.
  if (config.splits == 0) return sentence("%s:%s", family.name, family.tiles[config.tile]);
  return sentence("%s:%s:%d:%d:%s", family.name, family.tiles[config.tile], config.splits, config.full_tiles,
                  config.packed_bytes > 0 ? "packed" : "unpacked");
}

}  // namespace adder2d
