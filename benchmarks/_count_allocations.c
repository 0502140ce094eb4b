// Counts heap allocations between counting_start and counting_stop, underneath everything: preloaded in front of libc.
//
// "Aligned" ones are what torch's CPU allocator and oneDNN ask for (posix_memalign and its kin); "large" ones are any
// other of at least 4096 bytes. Of each, those that were freed before counting_stop were temporary.
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

enum { LARGE = 4096, TABLE = 1 << 16 };
static atomic_int armed;
static atomic_flag busy = ATOMIC_FLAG_INIT;
static struct { void* p; int kind; } table[TABLE];  // open addressing; a removed entry keeps its place
static char removed;
static uint64_t made[2], freed[2], bytes[2], lost;

static size_t slot_of(void* p) { return ((uintptr_t)p >> 4) * 0x9E3779B97F4A7C15u >> 48; }
static void enter(void) { while (atomic_flag_test_and_set(&busy)) {} }
static void leave(void) { atomic_flag_clear(&busy); }

static void* note(void* p, size_t n, int kind) {
  if (!atomic_load(&armed) || p == NULL || (kind == 1 && n < LARGE)) return p;
  enter();
  made[kind]++;
  bytes[kind] += n;
  size_t i = slot_of(p), tries = 0;
  while (table[i].p != NULL && table[i].p != (void*)&removed && tries++ < TABLE) i = (i + 1) % TABLE;
  if (tries < TABLE) { table[i].p = p; table[i].kind = kind; } else lost++;
  leave();
  return p;
}

static void forget(void* p) {
  if (!atomic_load(&armed) || p == NULL) return;
  enter();
  for (size_t i = slot_of(p), tries = 0; table[i].p != NULL && tries < TABLE; i = (i + 1) % TABLE, tries++) {
    if (table[i].p != p) continue;
    table[i].p = &removed;
    freed[table[i].kind]++;
    break;
  }
  leave();
}

void* malloc(size_t n) { return note(__libc_malloc(n), n, 1); }
void* calloc(size_t k, size_t n) { return note(__libc_calloc(k, n), k * n, 1); }
void* realloc(void* p, size_t n) { forget(p); return note(__libc_realloc(p, n), n, 1); }
void free(void* p) { forget(p); __libc_free(p); }
void* memalign(size_t a, size_t n) { return note(__libc_memalign(a, n), n, 0); }
void* aligned_alloc(size_t a, size_t n) { return memalign(a, n); }
int posix_memalign(void** out, size_t a, size_t n) {
  if (a % sizeof(void*) || (a & (a - 1)) || a == 0) return EINVAL;
  void* p = memalign(a, n);
  if (p == NULL) return ENOMEM;
  *out = p;
  return 0;
}

void counting_start(void) {
  memset(table, 0, sizeof table);
  for (int k = 0; k < 2; ++k) made[k] = freed[k] = bytes[k] = 0;
  lost = 0;
  atomic_store(&armed, 1);
}

// aligned: made, freed, bytes; large: made, freed, bytes; not tracked
void counting_stop(uint64_t out[7]) {
  atomic_store(&armed, 0);
  for (int k = 0; k < 2; ++k) {
    out[3 * k] = made[k];
    out[3 * k + 1] = freed[k];
    out[3 * k + 2] = bytes[k];
  }
  out[6] = lost;
}
