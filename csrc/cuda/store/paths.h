/* paths.h: where this module and the libraries beside it lie on disk. Buffers are FA_PATH_BYTES; too long a path counts as absent. */
#ifndef FA_PATHS_H
#define FA_PATHS_H

enum { FA_PATH_BYTES = 512 };

/* The folder of the file that holds this function: the Python package. Returns 1 when it is known. */
int fa_path_of_module(char *directory);

/* A library mapped in this process whose file name starts with `prefix` and holds none of the words of `excluded` (ends with NULL). */
int fa_path_mapped(const char *prefix, const char *const *excluded, char *path);

/* Cuts the last `levels` parts off. Returns 0, path unchanged or shorter, when there are fewer. */
int fa_path_up(char *path, int levels);

/* printf into a path buffer. Returns 1 when it fits. */
int fa_path_format(char *path, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
