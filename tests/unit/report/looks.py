"""How pages are looked at in Chromium, and what must not be seen there."""

WIDTHS = {"light": (1100, False), "dark": (1100, True), "phone": (390, False), "phone-dark": (390, True)}

# What is not drawn as it should be: empty pictures, text outside of its picture or in a colour of its own.
FAULTS = """
[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const name = svg.dataset.plot, frame = svg.getBoundingClientRect(), faults = [];
  const ink = getComputedStyle(svg).color;
  const shapes = [...svg.querySelectorAll('path, use, image')].filter(shape => {
    const box = shape.getBoundingClientRect();
    return !shape.closest('defs') && (box.width > 20 || box.height > 20);
  });
  if (frame.width < 200 || frame.height < 50) faults.push(name + ': no size');
  if (shapes.length < 3) faults.push(name + ': only ' + shapes.length + ' shapes');
  const texts = [...svg.querySelectorAll('text')];
  if (texts.length < 3) faults.push(name + ': only ' + texts.length + ' texts');
  for (const text of texts) {
    const box = text.getBoundingClientRect();
    if (getComputedStyle(text).fill != ink) faults.push(name + ': colour of ' + text.textContent);
    if (box.left < frame.left - 4 || box.right > frame.right + 4) faults.push(name + ': cut off ' + text.textContent);
  }
  for (const image of svg.querySelectorAll('image'))
    if (image.getBoundingClientRect().width < 100) faults.push(name + ': image without width');
  return faults;
})
"""
# Contrast (WCAG) of words and of drawn lines with the page behind them.
CONTRAST = """
(() => {
  const style = getComputedStyle(document.documentElement), canvas = document.createElement('canvas').getContext('2d');
  const luminance = name => {
    canvas.fillStyle = style.getPropertyValue(name).trim();
    const parts = canvas.fillStyle.match(/[0-9a-f]{2}/g).map(part => parseInt(part, 16) / 255);
    const linear = parts.map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const contrast = (one, other) => {
    const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const found = {};
  for (const name of ['--ink', '--muted', '--good', '--warn', '--bad'])
    found[name] = Math.min(contrast(name, '--page'), contrast(name, '--card'));
  for (const number of [1, 2, 3, 4]) found['--series-' + number] = contrast('--series-' + number, '--page');
  return found;
})()
"""
