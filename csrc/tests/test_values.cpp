#include "../include/values.h"

#include "check.h"

using namespace variant;

int main() {
  // Two rows of three entries, every second element; lengths three apart.
  int32_t table[12] = {0, -7, 3, -7, -1, -7, 1, -7, 2, -7, 9, -7};
  int32_t lens[4] = {8, -7, -7, 5};
  const auto fits = [&](int64_t pages) {
    return fits_page_table(2, 3, {table, 6, 2}, {lens, 3}, pages, 4);
  };
  CHECK(fits(4), "entries past a length %d may hold anything", lens[0]);
  CHECK(!fits(3), "page %d of 3", table[2]);
  lens[0] = 9;  // uses the entry that is -1
  CHECK(!fits(4), "page %d", table[4]);
  table[4] = 0;
  CHECK(fits(4), "length %d", lens[0]);
  lens[0] = 12;
  CHECK(fits(4), "length %d fills the table", lens[0]);
  lens[0] = 13;
  CHECK(!fits(4), "length %d is past the table", lens[0]);
  lens[0] = -1;
  CHECK(!fits(4), "length %d", lens[0]);
  lens[0] = 0;
  table[0] = 99;
  CHECK(fits(4), "length %d reads no entry", lens[0]);
  CHECK(fits_page_table(0, 3, {nullptr, 3, 1}, {nullptr, 1}, 0, 4), "no row in %d", 0);

  int64_t slots[8] = {-1, 99, 5, 99, 0, 99, 3, 99};
  CHECK(fits_slots(2, 2, {slots, 4, 2}, 6), "slot %lld of 6", static_cast<long long>(slots[2]));
  CHECK(!fits_slots(2, 2, {slots, 4, 2}, 5), "slot %lld of 5", static_cast<long long>(slots[2]));
  slots[6] = -2;
  CHECK(!fits_slots(2, 2, {slots, 4, 2}, 6), "slot %lld", static_cast<long long>(slots[6]));
  CHECK(fits_slots(0, 2, {nullptr, 4, 2}, 0) && fits_slots(2, 0, {nullptr, 0, 1}, 0), "none in %d",
        0);
  return 0;
}
