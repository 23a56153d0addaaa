// Formats numbers for display.

const UNITS = ["bytes", "kB", "MB", "GB", "TB"];

/** 1234567 -> "1,234,567". */
export const count = (value) => Math.round(value).toLocaleString("en");

/** Two or three significant digits and a decimal unit: 1234567 -> "1.2 MB". */
export function bytes(value) {
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${unit === 0 || value >= 99.5 ? Math.round(value) : value.toPrecision(value >= 9.95 ? 3 : 2)} ${UNITS[unit]}`;
}

/** 0.42 -> "42 %". */
export const percent = (ratio) => `${(100 * ratio).toFixed(ratio > 0 && ratio < 0.0995 ? 1 : 0)} %`;

/** "0.4 s", "12 s", "3 min 5 s", "2 h 10 min". */
export function seconds(value) {
  if (value < 9.95) return `${value.toFixed(1)} s`;
  const rounded = Math.round(value);
  if (rounded < 60) return `${rounded} s`;
  if (rounded < 3600) return `${Math.floor(rounded / 60)} min ${rounded % 60} s`;
  return `${Math.floor(rounded / 3600)} h ${Math.floor((rounded % 3600) / 60)} min`;
}

/** 8.123 -> "8.1", 123.4 -> "123". */
export const rate = (value) => (value >= 99.95 || value === 0 ? count(value) : value.toFixed(1));

/** [1, 2, 3, 7] -> "1–3, 7". */
export function ranges(numbers) {
  const runs = [];
  for (const number of numbers) {
    const last = runs.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}
