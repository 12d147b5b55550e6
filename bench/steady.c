/* Loaded into a benchmark that counts instructions: what would be random is the same each time.
 * The standard library takes the keys of its hash tables from here, and how full the way to an
 * entry is depends on them. */
#include <stddef.h>
#include <string.h>
#include <sys/types.h>

ssize_t getrandom(void *bytes, size_t length, unsigned flags) {
    (void)flags;
    memset(bytes, 7, length);
    return (ssize_t)length;
}
