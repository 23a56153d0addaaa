// Numbers as people read them.

const UNITS = ["bytes", "kB", "MB", "GB", "TB"];

/** 1234567 -> "1,234,567". */
export const count = (value) => Math.round(value).toLocaleString("en");

/** Three digits and a unit of powers of ten. */
export function bytes(value) {
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${unit === 0 || value >= 99.5 ? Math.round(value) : value.toPrecision(value >= 9.95 ? 3 : 2)} ${UNITS[unit]}`;
}

/** 0.42 -> "42 %". */
export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;

/** "0.4 s", "12 s", "3 min 5 s", "2 h 10 min". */
export function seconds(value) {
  if (value < 9.95) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** 8.123 -> "8.1", 123.4 -> "123". */
export const rate = (value) => (value >= 99.95 || value === 0 ? count(value) : value.toFixed(1));

/** [1, 2, 3, 7] -> "1–3, 7". */
export function ranges(numbers) {
  const found = [];
  for (const number of numbers) {
    const last = found.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else found.push([number, number]);
  }
  return found.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}
