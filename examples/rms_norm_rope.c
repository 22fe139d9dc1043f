/* A port of RMSNorm and RoPE in C, forward and backward, in double.

   rms_norm_rope.py compiles it, feeds it the conformance vectors and writes what it returns. */

#include <math.h>
#include <stddef.h>

/* y = w x r with r = 1/sqrt(mean(x^2) + eps), for rows of n. */
void rms_norm_forward(const double *x, const double *w, double eps, size_t rows, size_t n, double *y) {
    for (size_t i = 0; i < rows; i++, x += n, y += n) {
        double sum = 0;
        for (size_t j = 0; j < n; j++) sum += x[j] * x[j];
        double r = 1 / sqrt(sum / n + eps);
        for (size_t j = 0; j < n; j++) y[j] = w[j] * x[j] * r;
    }
}

/* dx, and dw summed over the rows. */
void rms_norm_backward(const double *dy, const double *x, const double *w, double eps, size_t rows,
                       size_t n, double *dx, double *dw) {
    for (size_t j = 0; j < n; j++) dw[j] = 0;
    for (size_t i = 0; i < rows; i++, x += n, dy += n, dx += n) {
        double sum = 0, dot = 0;
        for (size_t j = 0; j < n; j++) sum += x[j] * x[j];
        double r = 1 / sqrt(sum / n + eps);
        for (size_t j = 0; j < n; j++) dot += dy[j] * w[j] * x[j] * r;
        for (size_t j = 0; j < n; j++) {
            dx[j] = r * (dy[j] * w[j] - x[j] * r * dot / n);
            dw[j] += dy[j] * x[j] * r;
        }
    }
}

/* Turn the pairs of each of `heads` heads of width n by the angles of its token, times factor. The
   pairs are (2i, 2i+1), or (i, i + n/2) if halves. sign is 1 for the forward, -1 for the backward. */
void rope(const double *x, const double *position, const double *inv_freq, double factor, int halves,
          int sign, size_t tokens, size_t heads, size_t n, double *y) {
    for (size_t t = 0; t < tokens; t++)
        for (size_t h = 0; h < heads; h++, x += n, y += n)
            for (size_t i = 0; i < n / 2; i++) {
                size_t a = halves ? i : 2 * i, b = halves ? i + n / 2 : 2 * i + 1;
                double angle = sign * position[t] * inv_freq[i];
                double c = factor * cos(angle), s = factor * sin(angle);
                y[a] = x[a] * c - x[b] * s;
                y[b] = x[b] * c + x[a] * s;
            }
}
